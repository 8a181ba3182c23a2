// A module that gets a token for $RESOURCE. Nothing in it knows of perceptd.
const { DefaultAzureCredential } = require("@azure/identity");

const resource = process.env.RESOURCE || "https://vault.azure.net";

new DefaultAzureCredential().getToken(resource + "/.default").then(
  (token) => {
    const minutes = Math.round((token.expiresOnTimestamp - Date.now()) / 60000);
    console.log(`a token for ${resource}, to be used for ${minutes} minutes`);
  },
  (error) => {
    console.error(`no token for ${resource}: ${error.message}`);
    process.exitCode = 1;
  },
);
