// Package rooms proves the house's arrows: which of the service's files may use what another declares, and
// which packages know of wallets.
package rooms

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// rooms are in this order: each uses what stands behind it only.
var rooms = []string{"main.go", "cdc.go", "wallet.go", "cache.go", "outbox.go"}

// knowing are the packages under internal/ that know of wallets. All others are leaves: another service could
// take them unchanged.
var knowing = []string{"book", "rebuild"}

const home = "../.."

func TestArrowsOfRooms(t *testing.T) {
	fset := token.NewFileSet()
	var files []*ast.File
	for _, room := range rooms {
		f, err := parser.ParseFile(fset, filepath.Join(home, room), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	// What the five libraries declare does not matter here: without it there are errors, and names of ours
	// are found all the same.
	info := &types.Info{Uses: make(map[*ast.Ident]types.Object)}
	cfg := types.Config{Importer: importer.ForCompiler(fset, "source", nil), Error: func(error) {}}
	pkg, _ := cfg.Check("wallet", fset, files, info)
	arrows := make(map[[2]string]int) // from, to: uses
	for name, object := range info.Uses {
		if object.Pkg() != pkg || !object.Pos().IsValid() {
			continue
		}
		from := slices.Index(rooms, filepath.Base(fset.Position(name.Pos()).Filename))
		to := slices.Index(rooms, filepath.Base(fset.Position(object.Pos()).Filename))
		if from > to {
			t.Errorf("%s uses %s, which %s declares", fset.Position(name.Pos()), name.Name, rooms[to])
		}
		if from != to {
			arrows[[2]string{rooms[from], rooms[to]}]++
		}
	}
	for _, arrow := range [][2]string{{"main.go", "cdc.go"}, {"main.go", "wallet.go"},
		{"wallet.go", "cache.go"}, {"cache.go", "outbox.go"}, {"cdc.go", "outbox.go"}} {
		if arrows[arrow] == 0 {
			t.Errorf("%s uses nothing of %s: is this test blind?", arrow[0], arrow[1])
		}
	}
}

func TestLeavesKnowNoWallets(t *testing.T) {
	uses := make(map[string]map[string]bool)
	folders, err := filepath.Glob(filepath.Join(home, "internal", "*"))
	if err != nil || len(folders) < 10 {
		t.Fatalf("%d packages, %v", len(folders), err)
	}
	for _, folder := range folders {
		name := filepath.Base(folder)
		uses[name] = make(map[string]bool)
		sources, _ := filepath.Glob(filepath.Join(folder, "*.go"))
		for _, source := range sources {
			f, err := parser.ParseFile(token.NewFileSet(), source, nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range f.Imports {
				path := strings.Trim(i.Path.Value, `"`)
				if leaf, ours := strings.CutPrefix(path, "wallet/internal/"); ours {
					uses[name][leaf] = true
				}
			}
		}
	}
	for name, leaves := range uses {
		for _, leaf := range slices.Sorted(maps.Keys(leaves)) {
			if slices.Contains(knowing, leaf) && !slices.Contains(knowing, name) {
				t.Errorf("internal/%s imports internal/%s, so it knows of wallets", name, leaf)
			}
		}
	}
	if !uses["book"]["money"] {
		t.Error("internal/book does not use internal/money: is this test blind?")
	}
}
