package tokencache_test

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"perceptd/tokencache"
)

func TestSecretIsNotPrinted(t *testing.T) {
	t.Parallel()
	const canary = "canary-4f1d"
	token := tokencache.Token{Text: tokencache.NewSecret(canary)}
	type hidden struct{ token tokencache.Token }
	var printed strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		for _, value := range []any{token.Text, &token.Text, token, &token, hidden{token}, []any{token},
			map[string]any{"a": token}} {
			fmt.Fprintf(&printed, verb, value)
		}
	}
	asJSON, err := json.Marshal(map[string]any{"token": token})
	if err != nil {
		t.Fatal(err)
	}
	asXML, err := xml.Marshal(token.Text)
	if err != nil {
		t.Fatal(err)
	}
	binary, _ := token.Text.MarshalBinary()
	slog.New(slog.NewTextHandler(&printed, nil)).Info("x", "token", token, "text", token.Text)
	printed.Write(asJSON)
	printed.Write(asXML)
	printed.Write(binary)
	printed.WriteString(token.Text.String() + token.Text.GoString())
	for _, leak := range []string{canary, fmt.Sprintf("%x", canary), fmt.Sprintf("%X", canary)} {
		if strings.Contains(printed.String(), leak) {
			t.Errorf("the text was printed: %s", printed.String())
		}
	}
	if token.Text.Reveal() != canary || token.Text.IsZero() || (tokencache.Secret{}).Reveal() != "" {
		t.Error("Reveal does not reveal")
	}
	const want = "cc0af97287543b65da2c7e1476426021826cab166f1e063ed012b855ff819656"
	if got := tokencache.NewSecret("test_token").SHA256(); got != want {
		t.Errorf("SHA256 %s", got)
	}
}
