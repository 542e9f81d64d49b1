// The OpenAPI document of a table of routes.

package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"wallet/internal/gate"
)

// Object is a JSON object.
type Object = map[string]any

// Contract is what the routes' names stand for in the OpenAPI document. Where bodies have fields, Schemas has
// the IdempotencyKey; Problem is added to them.
type Contract struct {
	Title, Version, Description string `json:"-"`
	// By name: of answers, of a body's fields, of a query's parameters.
	Schemas, Fields, Parameters Object
}

// ReadContract adds what a JSON document says by its members schemas, fields and parameters. The document
// is a part of the program: a bad one is a programmer's error.
func ReadContract(document []byte, c Contract) Contract {
	if err := json.Unmarshal(document, &c); err != nil {
		panic(fmt.Sprintf("contract: %v", err))
	}
	return c
}

// record is the schema of an object that has all of these members and no others.
func record(members Object) Object {
	names := slices.Sorted(maps.Keys(members))
	return Object{"type": "object", "properties": members, "required": names, "additionalProperties": false}
}

// OpenAPI makes the OpenAPI 3.1 document out of the route table: no route, parameter or refusal stands in it
// that is not there.
func (s *Server) OpenAPI(routes []Route, c Contract) []byte {
	paths := make(Object)
	for _, r := range routes {
		item, _ := paths[r.Path].(Object)
		if item == nil {
			item = make(Object)
			paths[r.Path] = item
		}
		item[strings.ToLower(r.Method)] = s.operation(&r, &c)
	}
	schemas := maps.Clone(c.Schemas)
	schemas["Problem"] = problemSchema
	document, err := json.MarshalIndent(Object{
		"openapi":  "3.1.0",
		"info":     Object{"title": c.Title, "version": c.Version, "description": c.Description},
		"paths":    paths,
		"security": []any{Object{"key": []string{}}},
		"components": Object{
			"schemas":         schemas,
			"securitySchemes": Object{"key": Object{"type": "http", "scheme": "bearer"}},
		},
	}, "", " ")
	if err != nil {
		panic(err)
	}
	return document
}

var problemSchema = func() Object { // of a document
	text := Object{"type": "string"}
	schema := record(Object{
		"type": text, "title": text, "status": Object{"type": "integer"}, "code": text, "detail": text,
		"error": text, "request_id": text,
	})
	schema["additionalProperties"] = true
	return schema
}()

// operation is one route in the document.
func (s *Server) operation(r *Route, c *Contract) Object {
	ref := func(name string) Object { return Object{"$ref": "#/components/schemas/" + name} }
	name := strings.NewReplacer("/", "_", "{", "", "}", "", ".", "_").Replace(r.Path)
	operation := Object{"summary": r.Doc.Summary, "operationId": strings.ToLower(r.Method) + name}
	var parameters []any
	if r.Doc.ID != "" {
		_, in, _ := strings.Cut(r.Path, "{")
		in, _, _ = strings.Cut(in, "}")
		parameters = append(parameters, Object{
			"name": in, "in": "path", "required": true, "schema": ref(r.Doc.ID)})
	}
	for _, name := range r.Doc.Query {
		parameters = append(parameters, Object{"name": name, "in": "query", "schema": c.Parameters[name],
			"required": slices.Contains(r.Doc.Required, name)})
	}
	if r.Doc.Body != nil {
		parameters = append(parameters, Object{
			"name": "Idempotency-Key", "in": "header", "schema": ref("IdempotencyKey"),
			"description": "In place of the body's idempotency_key; one of them is needed."})
		properties := make(Object)
		for _, name := range r.Doc.Body.Fields {
			properties[name] = c.Fields[cmp.Or(r.Doc.As[name], name)]
		}
		schema := Object{"type": "object", "properties": properties, "additionalProperties": false,
			"required": append([]string{}, r.Doc.Required...)} // in JSON a list, also where it is empty
		operation["requestBody"] = Object{"required": true, "content": content("json", schema)}
	}
	if len(parameters) > 0 {
		operation["parameters"] = parameters
	}
	success := strconv.Itoa(cmp.Or(r.Status, http.StatusOK))
	forms := content("json", ref(r.Doc.Answer))
	for kind, schema := range r.Doc.Forms {
		forms[kind] = Object{"schema": ref(schema)}
	}
	answers := Object{success: Object{"description": "Done.", "content": forms}}
	codes := make(map[int][]string)
	for _, code := range r.refusals() {
		status := s.problem(code).Status
		codes[status] = append(codes[status], code)
	}
	for status, list := range codes {
		slices.Sort(list)
		schema := Object{"allOf": []any{ref("Problem"),
			Object{"properties": Object{"code": Object{"enum": list}}}}}
		answers[strconv.Itoa(status)] = Object{
			"description": strings.Join(list, ", "), "content": content("problem+json", schema)}
	}
	operation["responses"] = answers
	if r.Scope == gate.Open {
		operation["security"] = []any{}
	}
	return operation
}

func content(kind string, schema Object) Object {
	return Object{"application/" + kind: Object{"schema": schema}}
}
