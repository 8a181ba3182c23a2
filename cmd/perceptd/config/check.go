package config

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// Checked is what a start would find.
type Checked struct {
	Reading
	Config    Config // what would be in force of the files that were read
	JudgedFor string // the user for whom files were judged; empty: this process's
	Connected error  // why what [iothub] names cannot be used; nil: it can, as far as this process knows
}

// Check reads the configuration for whom the daemon runs as: where root asks and the service has a user, for that user,
// who may be able to read less than root, and is in other groups. It also reads what [iothub] names, which the daemon
// does when it connects; a credential is the service's alone, and worth a warning.
func Check(path string) Checked {
	c, from := Checked{}, processFiles()
	if service := serviceReader(); os.Geteuid() == 0 && service != nil {
		c.JudgedFor, from = service.name, files{self: int(service.uid), reader: service}
		c.Reading = readTrustedFiles(path, &trust{reader: service}, otherMemberOf)
	} else {
		c.Reading = Read(path)
	}
	c.Config = c.Reading.Config()
	known, unknown := c.Config.IoTHub.withoutCredentials(os.Getenv(credentialsVariable))
	c.Config.Warnings = append(c.Config.Warnings, unknown...)
	if err := known.checkFiles(context.Background(), from); err != nil {
		c.Connected = fmt.Errorf("[iothub]: %w", err)
	}
	return c
}

// Fault names everything for which a reload would refuse the configuration; nil: it would not.
func (c Checked) Fault() error {
	return errors.Join(c.Reading.faultWith(c.Config), c.Connected)
}
