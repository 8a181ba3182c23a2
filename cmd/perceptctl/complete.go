package main

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
)

// completionTime is short: a person waits with a finger on the Tab key.
const completionTime = 2 * time.Second

// completeFrom offers a flag values from the daemon's status when the shell completes a command
// line. Whoever may not read the status is offered nothing.
func (a *app) completeFrom(command *cobra.Command, flag string, values func(api.Status) []string) {
	// It fails only for a flag that is not defined, or twice for the same.
	_ = command.RegisterFlagCompletionFunc(flag, a.fromStatus(values))
}

// fromStatus makes a completion of what the daemon's status has.
func (a *app) fromStatus(values func(api.Status) []string) cobra.CompletionFunc {
	return func(command *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(command.Context(), completionTime)
		defer cancel()
		status, err := a.client.Status(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(values(status), needsQuoting), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFromGrants offers a flag the callers that grants in force are for, of the kind that kind names: "module ".
func (a *app) completeFromGrants(command *cobra.Command, flag, kind string) {
	values := func(command *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(command.Context(), completionTime)
		defer cancel()
		answer, err := a.client.Grants(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for _, g := range answer.Grants {
			name, isOne := strings.CutPrefix(g.Caller, kind)
			if isOne && !needsQuoting(name) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	// It fails only for a flag that is not defined, or twice for the same.
	_ = command.RegisterFlagCompletionFunc(flag, values)
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

// localDenyIDs are those of the deny rules that can be lifted here.
func localDenyIDs(status api.Status) []string {
	if status.Deny == nil {
		return nil
	}
	var ids []string
	for _, rule := range status.Deny.Rules {
		if rule.Origin == api.DenyLocal {
			ids = append(ids, rule.ID)
		}
	}
	return ids
}
