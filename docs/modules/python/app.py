"""A module that gets a token for $RESOURCE. Nothing in it knows of perceptd."""

import os
import sys
import time

from azure.core.exceptions import ClientAuthenticationError
from azure.identity import DefaultAzureCredential

resource = os.environ.get("RESOURCE", "https://vault.azure.net")
try:
    token = DefaultAzureCredential().get_token(resource + "/.default")
except ClientAuthenticationError as error:
    sys.exit(f"no token for {resource}: {error.message}")
print(f"a token for {resource}, to be used for {(token.expires_on - time.time()) / 60:.0f} minutes")
