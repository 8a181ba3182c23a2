package hubtest

// identity is a device, or a module of one, with its twin.
type identity struct {
	device, module     string // module is empty for a device
	primary, secondary []byte // keys; nil: it signs in with a certificate
	thumbprint         string // SHA-256 of its certificate, in hexadecimal; empty: it signs in with a key
	byAuthority        bool   // it signs in with a certificate of its name, of the hub's authority
	disabled           bool
	generation         string // another for each identity that is made under one name
	etag               uint64 // of the registry's entry
	twin               twin
	configured         map[string]any // what configurations have set, by its path
	session            *session       // nil: it is not connected
	counters           Counters
	events             []Event
	messages           []message // to the device, that wait
}

// id is how an identity is known: "device", or "device/module". It is its client ID, too.
func (i *identity) id() string {
	if i.module == "" {
		return i.device
	}
	return i.device + "/" + i.module
}

// path is the part of topics and of resources that names the identity.
func (i *identity) path() string {
	if i.module == "" {
		return "devices/" + i.device
	}
	return "devices/" + i.device + "/modules/" + i.module
}
