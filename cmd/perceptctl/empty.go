package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// mayBeEmpty are the flags whose text, or file, may as well be none.
var mayBeEmpty = []string{"note", "body"}

// refuseEmpty returns an error where a flag or an argument stands on the command line with nothing in it, as a script
// writes whose variable is not set: what was to be narrowed would be about everything, or about everybody.
func refuseEmpty(command *cobra.Command, args []string) (err error) {
	command.Flags().Visit(func(flag *pflag.Flag) {
		if err == nil && isEmpty(flag) && !slices.Contains(mayBeEmpty, flag.Name) {
			err = fmt.Errorf("--%s is empty: leave it out, or say what it is about; in a script, is its variable set?",
				flag.Name)
		}
	})
	if err != nil || command.Name() == "exec" || command.DisableFlagParsing {
		// exec's arguments are another program's, and those of completion are being written.
		return err
	}
	if n := slices.IndexFunc(args, isBlank); n >= 0 {
		return fmt.Errorf("argument %d of %s is empty; in a script, is its variable set?", n+1, command.CommandPath())
	}
	return nil
}

// isEmpty reports whether a flag that takes a text, or several one by one, has an empty one.
func isEmpty(flag *pflag.Flag) bool {
	switch flag.Value.Type() {
	case "string":
		return isBlank(flag.Value.String())
	case "stringArray":
		list, isList := flag.Value.(pflag.SliceValue)
		return isList && slices.ContainsFunc(list.GetSlice(), isBlank)
	}
	return false
}

func isBlank(text string) bool { return strings.TrimSpace(text) == "" }
