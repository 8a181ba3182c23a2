"""Gets a token through azure-identity for each resource that it reads, and writes a line of JSON for each."""

import json
import logging
import sys

from azure.identity import DefaultAzureCredential, ManagedIdentityCredential

logging.disable()
if sys.argv[1] == "default":
    credential = DefaultAzureCredential()
elif len(sys.argv) > 2:
    credential = ManagedIdentityCredential(client_id=sys.argv[2])
else:
    credential = ManagedIdentityCredential()
print("{}", flush=True)
for resource in sys.stdin:
    answer = {}
    try:
        answer["token"] = credential.get_token(resource.strip() + "/.default").token
    except Exception as error:
        answer["error"] = str(error)
    print(json.dumps(answer), flush=True)
