package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/agent/socket"
)

const modulesDir = api.RuntimeDir + "/" + api.ModulesDirName

func (a *app) moduleFoldersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "module-folders",
		Short: "give perceptd the modules' folders that a container engine has made",
		Long: `Give perceptd the folders below ` + modulesDir + ` that a container engine has
made for containers that were started before perceptd, as root. Each keeps its
inode, so that its container finds the socket in it. A folder that holds anything
but an empty folder token.sock is left as it is. perceptd has this done by itself,
by perceptd-modules.socket, for which systemd runs this verb.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(context.Context) error {
			given, err := socket.GiveFolders(modulesDir, api.TokenSocketName)
			var text strings.Builder
			for _, of := range given {
				fmt.Fprintln(&text, of)
			}
			if printed := a.print(text.String()); err == nil {
				err = printed
			}
			return err
		}),
	}
}
