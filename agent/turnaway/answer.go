package turnaway

import (
	"fmt"
	"net/http"
)

// answer has the fields of RFC 9457, as perceptd's own form, and those that SDKs show: which form would be asked for is not
// known. Whatever reads JSON reads both.
var answer = func() []byte {
	const (
		status = http.StatusTooManyRequests
		code   = "too_many_requests" // api.CodeBusy
		detail = "there is no free connection: ask again in a moment, and keep fewer connections at once"
	)
	title := http.StatusText(status)
	body := fmt.Sprintf(`{"type":"urn:percept:problem:%s","title":%q,"status":%d,"detail":%q,"code":%q,`+
		`"error":"invalid_request","error_description":%q,"statusCode":%d,"message":%q}`+"\n",
		code, title, status, detail, code, detail, status, detail)
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nContent-Type: application/problem+json\r\nCache-Control: no-store\r\n"+
		"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", status, title, len(body), body)
}()
