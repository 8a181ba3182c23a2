package grants

import "strings"

// azureResources are the resources of Azure's services as its documents and SDKs spell them, the one to advise first. A
// name that they use with and without a slash at the end is there twice.
var azureResources = [...]string{
	"https://vault.azure.net",      // Key Vault
	"https://managedhsm.azure.net", // Managed HSM
	"https://storage.azure.com", "https://storage.azure.com/",
	"https://iothubs.azure.net", // IoT Hub, by its service's side
	"https://azure-devices-provisioning.net",
	"https://management.azure.com", "https://management.azure.com/",
	"https://management.core.windows.net/", "https://management.core.windows.net",
	"https://cognitiveservices.azure.com", "https://cognitiveservices.azure.com/",
	"https://servicebus.azure.net", "https://servicebus.azure.net/",
	"https://eventhubs.azure.net", "https://eventhubs.azure.net/",
	"https://eventgrid.azure.net",
	"https://database.windows.net/", "https://database.windows.net",
	"https://ossrdbms-aad.database.windows.net", "https://ossrdbms-aad.database.windows.net/",
	"https://cosmos.azure.com", "https://cosmos.azure.com/",
	"https://digitaltwins.azure.net",
	"https://monitor.azure.com", "https://monitor.azure.com/",
	"https://api.loganalytics.io", "https://api.loganalytics.io/",
	"https://containerregistry.azure.net", "https://containerregistry.azure.net/",
	"https://azconfig.io",
	"https://search.azure.com", "https://search.azure.com/",
	"https://ml.azure.com", "https://ml.azure.com/",
	"https://graph.microsoft.com", "https://graph.microsoft.com/",
	"https://graph.windows.net", "https://graph.windows.net/",
	"https://batch.core.windows.net/", "https://batch.core.windows.net",
	"https://datalake.azure.net/", "https://datalake.azure.net",
}

// UnusualSpelling returns how Azure spells a resource of its own that is spelt otherwise here; empty: it is spelt so,
// or is not one of Azure's that are known.
func UnusualSpelling(resource string) string {
	asked := partsOf(resource)
	usual := ""
	for _, one := range azureResources {
		switch {
		case one == resource:
			return ""
		case usual == "" && asked.isSame(partsOf(one)):
			usual = one
		}
	}
	return usual
}

// SpellingNotes says of which resources of the grants and alternates the spelling is unlikely to be what callers ask
// for, each once.
func (r Rules) SpellingNotes() []string {
	var all []string
	for _, resource := range r.resources() {
		s := partsOf(resource)
		switch usual := UnusualSpelling(resource); {
		case usual != "":
			all = append(all, resource+" is not how Azure spells that resource: "+usual+
				" is, and callers that ask for it are not granted this one")
		case strings.EqualFold(s.scheme, "http"):
			all = append(all, resource+" has the scheme http: the names of Azure's resources begin with https")
		case s.doubled || s.dot || s.port != "" || s.host != strings.ToLower(s.host):
			all = append(all, resource+" has "+inWords(s.oddities())+
				": callers that spell it otherwise are not granted it")
		}
	}
	return all
}

// oddities says what is in a resource that the names of resources rarely have.
func (s parts) oddities() []string {
	plain := s
	plain.whole, plain.port, plain.doubled, plain.dot, plain.host = "", "", false, false, strings.ToLower(s.host)
	return s.differences(plain)
}
