package main

import (
	"context"
	"regexp"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
)

// completeFrom offers a flag values from the daemon's status when the shell completes a command
// line. Whoever may not read the status is offered nothing.
func (a *app) completeFrom(command *cobra.Command, flag string, values func(api.Status) []string) {
	// It fails only for a flag that is not defined, or twice for the same.
	_ = command.RegisterFlagCompletionFunc(flag, a.fromStatus(values))
}

// fromStatus makes a completion of what the daemon's status has.
func (a *app) fromStatus(values func(api.Status) []string) cobra.CompletionFunc {
	return func(command *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		// Somebody waits with a finger on the Tab key.
		ctx, cancel := context.WithTimeout(command.Context(), 2*time.Second)
		defer cancel()
		status, err := a.client.Status(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(values(status), needsQuoting), cobra.ShellCompDirectiveNoFileComp
	}
}

// needsQuoting reports whether a value is not offered, since a shell would read it as anything but one word.
func needsQuoting(value string) bool { return !plainWord.MatchString(value) }

var plainWord = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z_.:/@%+=,-]*$`)

func identityNames(status api.Status) []string {
	var names []string
	for _, identity := range status.Identities {
		names = append(names, identity.Name)
	}
	return names
}

func cachedResources(status api.Status) []string {
	var resources []string
	for _, token := range status.Tokens {
		resources = append(resources, token.Resource)
	}
	return resources
}

func changeIDs(status api.Status) []string {
	var ids []string
	for _, change := range status.Changes {
		ids = append(ids, change.ID)
	}
	return ids
}
