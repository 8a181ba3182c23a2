package simulator

import (
	"fmt"
	"net/http"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// asSteerer makes the test binary a process that makes a control request to that URL and prints its answer's status.
const asSteerer = "SIMULATOR_TEST_STEERER"

func TestMain(m *testing.M) {
	if at := os.Getenv(asSteerer); at != "" {
		askAsSteerer(at)
		return
	}
	goleak.VerifyTestMain(m)
}

func askAsSteerer(at string) {
	r, err := http.NewRequest(http.MethodGet, at, nil)
	if err != nil {
		panic(err)
	}
	r.Header.Set("Simulator-Control", "true")
	r.Header.Set("Metadata", "true")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		panic(err)
	}
	fmt.Print(answer.StatusCode)
}
