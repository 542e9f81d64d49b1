// Lists of any length, a page at a time: by keyset, without totals.

package api

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Cursor names the rest of a list of some kind by two numbers above 0: opaque to clients.
func Cursor(kind string, a, b int64) string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%s.%d.%d", kind, a, b))
}

// ParseCursor reads what Cursor wrote for lists of that kind, and nothing else.
func ParseCursor(kind, s string) (a, b int64, err error) {
	raw, err := base64.RawURLEncoding.DecodeString(s)
	parts := strings.Split(string(raw), ".")
	var errs [2]error
	if err == nil && len(parts) == 3 {
		a, errs[0] = strconv.ParseInt(parts[1], 10, 64)
		b, errs[1] = strconv.ParseInt(parts[2], 10, 64)
	}
	if errors.Join(errs[:]...) != nil || a < 1 || b < 1 || Cursor(kind, a, b) != s {
		return 0, 0, refuse("parameter_malformed",
			"This cursor is not one of ours. Take it from the Link header of the page before.")
	}
	return a, b, nil
}

// Items on a page: by default, and at most.
const Limit, LimitMax = 50, 1000

// Page reads the parameters limit and cursor: how many items, and after which.
func (q Query) Page(kind string) (limit int, after [2]int64, err error) {
	n, err := q.Integer("limit", Limit, 1, LimitMax)
	if err == nil && q["cursor"] != "" {
		after[0], after[1], err = ParseCursor(kind, q["cursor"])
	}
	return int(n), after, err
}

// List answers with an array of at most limit items, of which there may be one more: then Link says where the
// next page is. path ends in ? or &, cursor names the rest after an item.
func List[T any](path string, items []T, limit int, show func([]byte, T) []byte,
	cursor func(T) string) *Reply {
	answer := &Reply{}
	if len(items) > limit {
		items = items[:limit]
		answer.Header = Next(path, limit, cursor(items[limit-1]))
	}
	answer.Body = AppendList(nil, items, show)
	return answer
}

// Next is the header that names the next page.
func Next(path string, limit int, cursor string) map[string]string {
	return map[string]string{"Link": fmt.Sprintf(`<%slimit=%d&cursor=%s>; rel="next"`, path, limit, cursor)}
}

// AppendList appends a JSON array.
func AppendList[T any](dst []byte, items []T, show func([]byte, T) []byte) []byte {
	dst = append(dst, '[')
	for i, item := range items {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = show(dst, item)
	}
	return append(dst, ']')
}
