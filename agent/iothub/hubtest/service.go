package hubtest

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Ask sends a request to the REST API, with the rights of the service, and returns the status and body of the answer.
func (h *Hub) Ask(ctx context.Context, method, path, body string) (status int, answer []byte, err error) {
	r, err := http.NewRequestWithContext(ctx, method, "https://"+h.Name()+path+"?api-version=2021-04-12",
		strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	resource, expires := url.QueryEscape(h.Name()), h.options.Now().Add(time.Hour).Unix()
	mac := hmac.New(sha256.New, h.policyKey)
	fmt.Fprintf(mac, "%s\n%d", resource, expires)
	r.Header.Set("Authorization", fmt.Sprintf("SharedAccessSignature sr=%s&sig=%s&se=%d&skn=%s", resource,
		url.QueryEscape(base64.StdEncoding.EncodeToString(mac.Sum(nil))), expires, policyName))
	r.Header.Set("Content-Type", "application/json")
	client := h.ServiceClient()
	defer client.CloseIdleConnections()
	response, err := client.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	answer, err = io.ReadAll(response.Body)
	return response.StatusCode, answer, err
}
