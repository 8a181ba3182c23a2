package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/simulator"
)

func (a *app) simulatePermissionsCommand() *cobra.Command {
	var at string
	var change simulator.PermissionsChange
	command := &cobra.Command{
		Use:   "permissions --identity NAME",
		Short: "change an identity's permissions at a simulated back end",
		Long: `Change the permissions that new tokens of an identity carry. What is not named stays
as it is; --groups= takes all groups away. Tokens in the back end's cache keep
what they were minted with, as Azure's do.`,
		Example: `  perceptctl simulate permissions --identity vision --roles Secrets.Read --groups=`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error {
			var changed simulator.PermissionsChanged
			if err := a.steer(ctx, at, http.MethodPost, "permissions", change, &changed); err != nil {
				return err
			}
			return a.print(fmt.Sprintf("changed; tokens minted from %s UTC on carry it\n", changed.Reaches.UTC().Format(time.DateTime)))
		}),
	}
	flags := command.Flags()
	flags.StringVar(&change.Identity, "identity", "", "`name` of the identity (required)")
	flags.StringSliceVar(&change.Groups, "groups", nil, "object `IDs` of groups, with commas between")
	flags.StringSliceVar(&change.Roles, "roles", nil, "app `roles`, likewise")
	flags.StringSliceVar(&change.WIDs, "wids", nil, "template `IDs` of directory roles, likewise")
	a.atFlag(command, &at)
	command.MarkFlagsOneRequired("groups", "roles", "wids")
	// It fails only for a flag that is not defined.
	_ = command.MarkFlagRequired("identity")
	return command
}
