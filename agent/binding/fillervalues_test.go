package binding

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// What makers leave in the place of a UUID or a serial number tells no device apart, however it is written.
func TestFillerValues(t *testing.T) {
	t.Parallel()
	for _, value := range []string{
		"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
		"11111111-1111-1111-1111-111111111111",
		"01010101-0101-0101-0101-010101010101", "fefefefe-fefe-fefe-fefe-fefefefefefe",
		"00000000-0000-0000-0000-000000000001",
		"03000200-0400-0500-0006-000700080009", "00020003-0004-0005-0006-000700080009",
		"01234567-89ab-cdef-0123-456789abcdef", "67452301-ab89-efcd-0123-456789abcdef",
		"fedcba98-7654-3210-fedc-ba9876543210",
		"00010203-0405-0607-0809-0a0b0c0d0e0f", "03020100-0504-0706-0809-0a0b0c0d0e0f",
		"11223344-5566-7788-99aa-bbccddeeff00", "44332211-6655-8877-99aa-bbccddeeff00",
		"00112233-4455-6677-8899-aabbccddeeff",
		"12345678-1234-1234-1234-123456789012", "12345678-1234-1234-1234-123456789abc",
		"12345678-1234-5678-1234-567812345678",
		"12345678-1234-5678-90ab-cddeefaabbcc", "12345678-90ab-cdef-1234-567890abcdef",
		"deadbeef-dead-beef-dead-beefdeadbeef", "6ab5b300-538d-1014-9fb5-b0684d007b53",
		"4c4c4544-0000-2010-8020-80c04f202020",
		"44454c4c-0000-1020-8020-80c04f202020",
		"0", "2", "1111111", "0000000000", "12345", "123456", "12345678", "123456789", "0123456789", "1234567890",
		"123456789012", "12345678901234567",
		"0123456789abcdef", "9876543210", "987654321", "112233445566", "abcdefgh", "abcabcabc", "abcd1234", "1234abcd",
		"nnnnnnn", "xxxxxxxxxxx",
		"0102030405060708", "sn-12345", "sn-1234567890", "sys-1234567890", "mb-1234567890", "mb1234567890",
		"sn-123456fvgv3i0b8o5n6n7k",
		"to be filled by o.e.m.", "to be filled by oem", "default string", "none", "(none)", "null", "(null string)",
		"not specified", "not applicable", "not available",
		"not settable", "not present", "n/a", "system serial number", "systemserialnumb", "chassis serial number",
		"base board serial number",
		"serial number", "serial number xxxxxx", "oem_serial", "o.e.m.", "invalid", "empty", "unknow", "unknown",
		"undefined", "unspecified",
		"no asset tag", "asset-1234567890", "iatpass", "eval", "tulip computers", "........", "-", "",
	} {
		for _, written := range []string{value, strings.ToUpper(value), strings.ReplaceAll(value, "-", ""),
			" " + value + "\n"} {
			if all := Here(device(t, map[string]string{uuidPath: written, serialPath: written + "\x00"})); all != nil {
				t.Errorf("a device is known by %q: %v", written, kindsOf(all))
			}
		}
	}
}

// A value of a device's own is none of these: nothing that a maker drew, and no serial number that counts devices.
func TestOwnValues(t *testing.T) {
	t.Parallel()
	own := []string{
		"7f3c2a10-5b1e-4c55-9d0a-3e1c7f5b2a99", "4c4c4544-004c-4c10-8034-b2c04f4d4e32",
		"00000000-0000-0000-0000-ac1f6b012345",
		"10000000a3b4c5d6", "00000000a3b4c5d6", "1423320a1b2c3d", "1420619012345", "c02xk0abjg5j", "000001274",
		"pf0abc12", "2023-08-000417", "0004f300d1a2",
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		own = append(own, fmt.Sprintf("%08x-%04x-4%03x-%04x-%012x", r.Uint32(), r.Uint32N(1<<16), r.Uint32N(1<<12),
			0x8000|r.Uint32N(1<<14), r.Uint64N(1<<48)))
		own = append(own, fmt.Sprintf("1000%012x", r.Uint64N(1<<48)))
	}
	for _, value := range own {
		if !tellsApart(value) {
			t.Errorf("%q tells no device apart", value)
		}
	}
}
