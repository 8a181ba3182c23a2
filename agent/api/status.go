package api

// StatusOf is the status of each code that the agent answers with, over HTTP and from a direct method of IoT Hub alike.
// A permanent one is never 404, 410, 429 or 5xx where SDKs ask: they repeat these.
var StatusOf = map[Code]int{
	CodeBadRequest:       400,
	CodeUnknownIdentity:  400,
	CodeAmbiguous:        400,
	CodeNotGranted:       403,
	CodeFaultyGrant:      403,
	CodeNoConfiguration:  503,
	CodeShortLife:        503,
	CodeThrottled:        503,
	CodeUnreachable:      503,
	CodeMalformedAnswer:  503,
	CodeIdentityNotFound: 400,
	CodeRefused:          403,
	CodeRevoked:          403,
	CodeNotYet:           503,
	CodeFutureChange:     422,
	CodeTooManyChanges:   422,
	CodeUnknownChange:    404,
	CodeNotKept:          507,
	CodeBusy:             429,

	CodeDenied:          403,
	CodeDenyRulesLost:   503,
	CodeUnknownDenyRule: 404,
	CodeNotRoot:         403,

	CodeTooManyDenyRules: 422,

	CodeUnknownMethod: 404,
	CodeNotCached:     404,
	CodeHubSetAside:   403,
}
