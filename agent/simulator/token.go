package simulator

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"
)

const (
	backdated = 5 * time.Minute // Entra dates iat and nbf back by this much

	warningText = "This token was made by a simulation. It is not signed, was issued by nobody and opens nothing. " +
		"If a resource accepts it, that resource does not check its tokens."
)

// Token is a token of the simulated back end and the truth about it. Its slices are shared: read only.
type Token struct {
	Text        string // JWT-shaped
	Identity    Identity
	Resource    string
	Permissions Permissions // as its claims have them
	Serial      uint64      // 1 for the first token that the back end issued, unique to this one
	Replica     int         // which replica holds it, from 0

	IssuedOn  time.Time // not dated back
	IssuedAt  time.Time // iat: dated back by five minutes, whole seconds
	NotBefore time.Time // nbf: likewise
	ExpiresOn time.Time // exp: whole seconds
	RollsOn   time.Time // from then on a request to its replica brings a newer token
}

// String leaves out the text, as everything that may be printed does.
func (m Token) String() string {
	return fmt.Sprintf("simulated token %d of %s for %s, issued on %s",
		m.Serial, m.Identity.Name, m.Resource, m.IssuedOn.UTC().Format(time.RFC3339))
}

// GoString is String, so that no verb prints the text.
func (m Token) GoString() string { return m.String() }

// claims are those of an Entra v1 token for a managed identity, and two that say what it is.
type claims struct {
	Aud       string   `json:"aud"`
	Iss       string   `json:"iss"`
	Iat       int64    `json:"iat"`
	Nbf       int64    `json:"nbf"`
	Exp       int64    `json:"exp"`
	Aio       string   `json:"aio"`
	AppID     string   `json:"appid"`
	AppIDAcr  string   `json:"appidacr"`
	Groups    []string `json:"groups,omitempty"`
	Idp       string   `json:"idp"`
	IdTyp     string   `json:"idtyp"`
	OID       string   `json:"oid"`
	RH        string   `json:"rh"`
	Roles     []string `json:"roles,omitempty"`
	Sub       string   `json:"sub"`
	TID       string   `json:"tid"`
	UTI       string   `json:"uti"`
	Ver       string   `json:"ver"`
	WIDs      []string `json:"wids,omitempty"`
	MirID     string   `json:"xms_mirid"`
	Simulated bool     `json:"simulated"`
	Warning   string   `json:"warning"`
}

// setText fills in m.Text from the rest of m. The unique claims follow from the seed.
func (m *Token) setText(seed uint64) {
	unique := sha256.Sum256(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, seed), m.Serial))
	issuer := "https://sts.simulated.invalid/" + m.Identity.TenantID + "/"
	body, err := json.Marshal(claims{
		Aud: m.Resource, Iss: issuer, Idp: issuer,
		Iat: m.IssuedAt.Unix(), Nbf: m.NotBefore.Unix(), Exp: m.ExpiresOn.Unix(),
		Aio: encode(unique[16:]), UTI: encode(unique[:16]), RH: "0.simulated",
		AppID: m.Identity.ClientID, AppIDAcr: "2", IdTyp: "app",
		OID: m.Identity.ObjectID, Sub: m.Identity.ObjectID, TID: m.Identity.TenantID,
		Groups: m.Permissions.Groups, Roles: m.Permissions.Roles, WIDs: m.Permissions.WIDs,
		Ver: "1.0", MirID: m.Identity.ResourceID, Simulated: true, Warning: warningText,
	})
	if err != nil {
		panic("simulator: strings and numbers did not marshal: " + err.Error())
	}
	m.Text = encode([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + encode(body) + "." + encode([]byte("simulated"))
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
