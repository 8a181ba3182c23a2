package link

import (
	"context"
	"encoding/base64"
	"net/url"
	"strconv"
	"time"

	"github.com/amenzhinsky/iothub/common"
)

// sign returns the password of l until expires, to the second.
//
// Source: IoT Hub, "Control access with shared access signatures".
func (l *Login) sign(ctx context.Context, expires time.Time) (string, error) {
	resource := l.resource()
	signature, err := l.Sign(ctx, []byte(url.QueryEscape(resource)+"\n"+strconv.FormatInt(expires.Unix(), 10)))
	if err != nil {
		return "", err
	}
	return (&common.SharedAccessSignature{
		Sr: resource, Sig: base64.StdEncoding.EncodeToString(signature), Se: expires,
	}).String(), nil
}
