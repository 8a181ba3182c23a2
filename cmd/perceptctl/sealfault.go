package main

import (
	"context"
	"errors"
	"regexp"
	"strconv"
	"strings"
)

// sealFault is why a sealed key was not opened, and what to do.
type sealFault struct {
	why, next string // a line each
	final     bool   // it does not open by itself while this device is on; else it is tried again
}

const (
	waitHint = "wait: " + cacheKeyUnit + " tries it again, and perceptd takes the key when it is open"
	// replaceHint is for keys that can never be opened again.
	replaceHint = "perceptctl cache-key make --replace makes another key; tokens that were sealed with this one are " +
		"fetched anew"
)

// Why a key was not opened.
var (
	lockedOut = sealFault{why: "the TPM is locked out (dictionary attack lockout), as after several losses of power",
		next: waitHint + "; a TPM unlocks by itself within minutes or hours while the device is on"}
	noRoom  = sealFault{why: "the TPM is out of sessions or memory, which other programs hold", next: waitHint}
	busy    = sealFault{why: "the TPM is busy", next: waitHint}
	hangs   = sealFault{why: "the TPM does not answer", next: waitHint + "; if it stays so, turn the device off and on"}
	broken  = sealFault{why: "the TPM says that it has failed", next: "turn the device off and on; " + waitHint}
	notHere = sealFault{why: "the TPM is not there, or not yet",
		next: waitHint + "; is it switched on in the firmware, and its driver loaded (ls /dev/tpmrm0)?"}
	noLibrary = sealFault{why: "systemd's library for the TPM is not installed",
		next: "install libtss2-esys-3.0.2-0, libtss2-rc0 and libtss2-tcti-device0 (or what your distribution calls " +
			"them); " + waitHint}
	otherState = sealFault{why: "Secure Boot is in another state than when the key was made (PCR 7)",
		next:  "set Secure Boot as it was, and start again; or, if it is to stay so: " + replaceHint,
		final: true}
	otherTPM = sealFault{why: "the TPM does not know the key: it was replaced or cleared, or the file is damaged",
		next: replaceHint, final: true}
	hostKeyGone = sealFault{why: "this host's key, /var/lib/systemd/credential.secret, is gone",
		next: replaceHint, final: true}
	damaged = sealFault{why: "it was sealed with another host's key, or the file is damaged",
		next: replaceHint, final: true}
)

// tpmCode is how the library for the TPM (tpm2-tss) writes a response code on standard error, whatever systemd makes of
// it.
var tpmCode = regexp.MustCompile(`ErrorCode \(0x([0-9a-fA-F]{8})\)`)

// sealFaultOf says why systemd-creds could not open a key. Where it does not know, the key is tried again.
func sealFaultOf(err error) sealFault {
	said := ""
	if failed, known := errors.AsType[*programError](err); known {
		said = failed.stderr
	}
	fault, known := sealFaultIn(said)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		fault = hangs
	case errors.Is(err, errNoProgram):
		return sealFault{why: err.Error(), next: "install systemd-creds; or else perceptctl cache-key make --replace " +
			"--with file makes a key in the clear", final: true}
	case !known:
		return sealFault{why: err.Error(), next: waitHint + "; systemctl status " + cacheKeyUnit + " has all of it"}
	}
	return fault
}

// sealFaultIn looks for the cause in what systemd-creds has said on standard error.
func sealFaultIn(said string) (fault sealFault, known bool) {
	if codes := tpmCode.FindAllStringSubmatch(said, -1); codes != nil {
		code, _ := strconv.ParseUint(codes[len(codes)-1][1], 16, 32) // eight digits
		if fault, known = sealFaultOfCode(uint32(code)); known {
			return fault, true
		}
	}
	for _, row := range []struct {
		words string
		fault sealFault
	}{
		{"dictionary attack lockout", lockedOut},
		{"using TPM2: No locks available", lockedOut},
		{"support is not installed", noLibrary},
		{"policy digest does not match", otherState},
		{"using TPM2: Operation not permitted", otherState},
		{"local credential key: No such file", hostKeyGone},
		{"Decryption failed", damaged},
		{"Encrypted file too short", damaged},
		{"encrypted credential data", damaged},
		{"corrupted data", damaged},
		{"Embedded credential name", damaged},
		{"tcti", notHere},
		{"TCTI", notHere},
	} {
		if strings.Contains(said, row.words) {
			return row.fault, true
		}
	}
	return sealFault{}, false
}

// Parts of a response code, as the TPM 2.0 Library Specification has them (part 2, 6.6) and TSS 2.0 its layers.
const (
	codeLayer     = 0x00ff0000
	layerTCTI     = 0x000a0000 // the way to the TPM
	layerManager  = 0x000c0000 // the resource manager passes on what the TPM has said
	codeFormat    = 0x080      // 1: it is about a parameter, a handle or a session
	codeWarning   = 0x900      // with format 0: the command may succeed another time
	codeLockout   = 0x921
	codeNoRoom    = 0x902 // and up to codeNoHandles
	codeNoHandles = 0x906
	codeFailure   = 0x101
	codeStarting  = 0x100 // TPM2_Startup is still to come
	codeIntegrity = 0x9f  // with format 1, without what it is about
	codePolicy    = 0x9d
)

func sealFaultOfCode(code uint32) (fault sealFault, known bool) {
	layer, response := code&codeLayer, code&0xfff
	switch {
	case layer == layerTCTI:
		return notHere, true
	case layer != 0 && layer != layerManager:
		return sealFault{}, false
	case response&codeFormat != 0 && response&0xbf == codeIntegrity:
		return otherTPM, true
	case response&codeFormat != 0 && response&0xbf == codePolicy:
		return otherState, true
	case response&codeFormat != 0:
		return sealFault{}, false
	case response == codeLockout:
		return lockedOut, true
	case response >= codeNoRoom && response <= codeNoHandles:
		return noRoom, true
	case response&codeWarning == codeWarning:
		return busy, true
	case response == codeFailure:
		return broken, true
	case response == codeStarting:
		return notHere, true
	}
	return sealFault{}, false
}
