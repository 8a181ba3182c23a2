package config

import (
	"context"
	"fmt"
	"os"
)

// Check is Load for whom the daemon runs as, who is named: where root asks and the service has a user, that user,
// who may be able to read less than root, and is in other groups. Empty: this process's user. It also reads what
// [iothub] names, which the daemon does when it connects; a credential is the service's alone, and worth a warning.
func Check(path string) (c Config, judgedFor string, err error) {
	from := processFiles()
	if service := serviceReader(); os.Geteuid() == 0 && service != nil {
		judgedFor, from = service.name, files{self: int(service.uid), reader: service}
		c, err = loadTrusted(path, &trust{reader: service}, otherMemberOf)
	} else {
		c, err = Load(path)
	}
	if err != nil {
		return c, judgedFor, err
	}
	known, unknown := c.IoTHub.withoutCredentials(os.Getenv(credentialsVariable))
	c.Warnings = append(c.Warnings, unknown...)
	if err := known.checkFiles(context.Background(), from); err != nil {
		return c, judgedFor, fmt.Errorf("[iothub]: %w", err)
	}
	return c, judgedFor, nil
}
