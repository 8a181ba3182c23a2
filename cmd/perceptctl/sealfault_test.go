package main

import (
	"context"
	"strings"
	"testing"
)

// What systemd-creds 252 and 257 say on standard error, with tpm2-tss 3.2 and 4.1 and an emulated TPM.
const (
	locked = "WARNING:esys:src/tss2-esys/api/Esys_Load.c:324:Esys_Load_Finish() Received TPM Error \n" +
		"ERROR:esys:src/tss2-esys/api/Esys_Load.c:112:Esys_Load() Esys Finish ErrorCode (0x00000921) \n"
	foreign = "WARNING:esys:src/tss2-esys/api/Esys_Load.c:324:Esys_Load_Finish() Received TPM Error \n" +
		"ERROR:esys:src/tss2-esys/api/Esys_Load.c:112:Esys_Load() Esys Finish ErrorCode (0x000001df) \n"
	crowded = "ERROR:esys:src/tss2-esys/api/Esys_StartAuthSession.c:136:Esys_StartAuthSession() Esys Finish " +
		"ErrorCode (0x00000903) \n"
	noDevice = "ERROR:tcti:src/tss2-tcti/tcti-device.c:452:Tss2_Tcti_Device_Init() Failed to open specified TCTI " +
		"device file /dev/tpmrm0: No such file or directory \n"
)

// A key is given up only where it can never be opened again; whatever else there is passes.
func TestSealFaults(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		want sealFault
		said []string
	}{
		{lockedOut, []string{
			locked + "TPM2 device is in dictionary attack lockout mode.",
			locked + "Failed to unseal secret using TPM2: No locks available",
			"TPM2 device is in dictionary attack lockout mode.",
			"Failed to unseal secret using TPM2: No locks available",
		}},
		{noRoom, []string{
			crowded + "Failed to open session in TPM: tpm:warn(2.0): out of memory for session contexts",
			crowded + "Failed to unseal secret using TPM2: State not recoverable",
		}},
		{notHere, []string{
			noDevice + "Failed to initialize TCTI context: tcti:IO failure", noDevice,
			"ERROR:tcti: Cannot connect to swtpm TPM socket",
		}},
		{noLibrary, []string{"TPM2 support is not installed."}},
		{otherTPM, []string{
			foreign + "Failed to load HMAC key in TPM: tpm:parameter(1):integrity check failed",
			foreign + "Failed to unseal secret using TPM2: State not recoverable",
		}},
		{otherState, []string{
			"Failed to unseal secret using TPM2: Operation not permitted",
			"Current policy digest does not match stored policy digest, cancelling TPM2 authentication attempt.",
		}},
		{hostKeyGone, []string{"Failed to determine local credential key: No such file or directory"}},
		{damaged, []string{
			"Decryption failed (incorrect key?): error:00000000:lib(0)::reason(0)",
			"Encrypted file too short.",
			"Failed to read encrypted credential data: Broken pipe",
			"Unknown encryption format, or corrupted data: Operation not supported",
		}},
	} {
		for _, said := range row.said {
			if got := sealFaultOf(&programError{program: "systemd-creds decrypt", stderr: said}); got != row.want {
				t.Errorf("%q: %+v, want %+v", said, got, row.want)
			}
		}
	}
	for _, unknown := range []string{"", "Failed to determine local credential key: Permission denied",
		"ErrorCode (0x0000018b)", "ErrorCode (0x00070005)", "out of memory"} {
		got := sealFaultOf(&programError{program: "systemd-creds decrypt", stderr: unknown, why: context.Canceled})
		if got.final || !strings.HasPrefix(got.next, "wait: ") {
			t.Errorf("%q is given up: %+v", unknown, got)
		}
	}
	if got := sealFaultOf(&programError{stderr: foreign, why: context.DeadlineExceeded}); got != hangs {
		t.Errorf("%+v of a TPM that does not answer", got)
	}
	if got := sealFaultOf(&absentError{"systemd-creds"}); !got.final {
		t.Errorf("%+v without systemd-creds", got)
	}
}

// The code of the TPM's answer counts, whatever layer has passed it on, and whatever it is about.
func TestSealFaultsByCode(t *testing.T) {
	t.Parallel()
	for code, want := range map[uint32]sealFault{
		0x921: lockedOut, 0x000c0921: lockedOut, 0x902: noRoom, 0x903: noRoom, 0x905: noRoom, 0x906: noRoom,
		0x908: busy, 0x920: busy, 0x922: busy, 0x923: busy, 0x101: broken, 0x100: notHere, 0x000a000a: notHere,
		0x1df: otherTPM, 0x9f: otherTPM, 0x99d: otherState, 0x9d: otherState,
	} {
		if got, known := sealFaultOfCode(code); !known || got != want {
			t.Errorf("%#x: %+v, want %+v", code, got, want)
		}
	}
	for _, code := range []uint32{0, 0x98e, 0x00070921, 0x120} {
		if got, known := sealFaultOfCode(code); known {
			t.Errorf("%#x is taken for %+v", code, got)
		}
	}
}

// Whatever systemd-creds says, a hint to replace the key comes with the end of all tries, and only then.
func FuzzSealFault(f *testing.F) {
	for _, said := range []string{locked, foreign, crowded, noDevice, "", "ErrorCode (0xffffffff)"} {
		f.Add(said)
	}
	f.Fuzz(func(t *testing.T, said string) {
		fault, known := sealFaultIn(said)
		if known != (fault != sealFault{}) || fault.final != strings.Contains(fault.next, "--replace") {
			t.Errorf("%q: %+v, %t", said, fault, known)
		}
		if strings.Contains(fault.why+fault.next, "\n") || strings.Contains(fault.why, statusNext) {
			t.Errorf("%+v is not in a line", fault)
		}
	})
}
