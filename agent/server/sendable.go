package server

import (
	"strings"

	"perceptd/agent/grants"
)

// sendable lists identities by what an SDK can send to name each, on that form. A configured name is nothing it can.
func sendable(identities []*grants.Identity, shape form) string {
	var all []string
	for _, identity := range identities {
		switch {
		case identity.ClientID != "":
			all = append(all, "client_id="+identity.ClientID)
		case identity.ObjectID != "":
			all = append(all, "object_id="+identity.ObjectID)
		case identity.ResourceID != "" && shape == formAppService:
			all = append(all, "mi_res_id="+identity.ResourceID)
		case identity.ResourceID != "":
			all = append(all, "msi_res_id="+identity.ResourceID)
		case len(identities) == 1 || identity.Default:
			all = append(all, "none, for the system-assigned identity")
		default:
			all = append(all, "nothing for the system-assigned identity, which has no ID: "+
				"an administrator can make it "+
				"the default")
		}
	}
	return strings.Join(all, ", or ")
}
