package link

import (
	"crypto/tls"
	"errors"
	"time"

	"github.com/amenzhinsky/iothub/common"
)

// libraryCredentials is a login as the library asks for it. Its tokens are not used: they are for the bare hub, and for
// an hour.
type libraryCredentials struct{ login *Login }

var errNotUsed = errors.New("signatures are made by the session")

func (c *libraryCredentials) GetDeviceID() string              { return c.login.Device }
func (c *libraryCredentials) GetModuleID() string              { return c.login.Module }
func (c *libraryCredentials) GetHostName() string              { return c.login.Hub }
func (c *libraryCredentials) GetBroker() string                { return c.login.Hub }
func (c *libraryCredentials) GetCertificate() *tls.Certificate { return c.login.Certificate }
func (c *libraryCredentials) GetSAK() string                   { return "" }
func (c *libraryCredentials) GetGenerationID() string          { return "" }
func (c *libraryCredentials) GetGateway() string               { return "" }
func (c *libraryCredentials) GetWorkloadURI() string           { return "" }
func (c *libraryCredentials) UseEdgeGateway() bool             { return false }

func (c *libraryCredentials) Token(string, time.Duration) (*common.SharedAccessSignature, error) {
	return nil, errNotUsed
}

func (c *libraryCredentials) TokenFromEdge(
	_, _, _, _ string, _ time.Duration,
) (*common.SharedAccessSignature, error) {
	return nil, errNotUsed
}

// silence drops what the library logs: payloads and topics are in it. What went wrong is in errors.
type silence struct{}

func (silence) Errorf(string, ...any) {}
func (silence) Warnf(string, ...any)  {}
func (silence) Infof(string, ...any)  {}
func (silence) Debugf(string, ...any) {}
