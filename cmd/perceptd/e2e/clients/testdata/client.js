// Gets a token through @azure/identity for each resource that it reads, and writes a line of JSON for each.
const readline = require("node:readline");
const { DefaultAzureCredential, ManagedIdentityCredential } = require("@azure/identity");

const [kind, clientId] = process.argv.slice(2);

function chosen() {
  if (kind === "default") {
    return new DefaultAzureCredential();
  }
  return clientId ? new ManagedIdentityCredential({ clientId }) : new ManagedIdentityCredential();
}

async function main() {
  const credential = chosen();
  console.log("{}");
  for await (const resource of readline.createInterface({ input: process.stdin })) {
    const answer = {};
    try {
      answer.token = (await credential.getToken(resource + "/.default")).token;
    } catch (error) {
      answer.error = String(error.message);
    }
    console.log(JSON.stringify(answer));
  }
}

main();
