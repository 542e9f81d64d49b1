// The OpenAPI document of a table of routes: what each takes and answers, for those who read it and for the
// generators of clients.
//
// It touches nothing. Nothing stands in the document that is not in the table, in the contract's names, or in
// what serve sends around every answer. Where generators read a construct differently, the one is taken that
// all of them read (dev/clients proves it).

package api

import (
	"bytes"
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

// Contract is what the routes' names stand for in the OpenAPI document. Problem and each body's schema are
// added to its Schemas.
type Contract struct {
	Title, Version, Description string `json:"-"`

	Tags       []Object
	Operations map[string]Operation // by method and path
	// Terms are what many schemas say alike: one that is like a term has its keywords, but for those that
	// it says itself.
	Terms Object
	// By name: of answers and of what stands in a path, of a body's fields, of a query's and a header's
	// parameters.
	Schemas, Fields, Parameters Object
}

// Operation is what the document says of a route besides what the table does. The ID is the name of a
// generated client's function.
type Operation struct {
	ID, Tag, Description string
	Headers              []string // that it heeds, besides those of all routes
}

// ReadContract adds what a JSON document says by Contract's names. The document is a part of the program: a
// bad one is a programmer's error.
func ReadContract(document []byte, c Contract) Contract {
	decoder := json.NewDecoder(bytes.NewReader(document))
	decoder.UseNumber() // the greatest id is no float
	if err := decoder.Decode(&c); err != nil {
		panic(fmt.Sprintf("contract: %v", err))
	}
	for _, schemas := range []Object{c.Schemas, c.Fields, c.Parameters} {
		for name, schema := range schemas {
			schemas[name] = c.spell(schema)
		}
	}
	return c
}

// spell writes terms out, in a schema and those within.
func (c *Contract) spell(schema any) any {
	s, ok := schema.(Object)
	if !ok {
		return schema
	}
	whole := make(Object)
	if name, ok := s["like"].(string); ok {
		term, known := c.Terms[name].(Object)
		if !known {
			panic("contract: no term " + name)
		}
		maps.Copy(whole, term)
	}
	maps.Copy(whole, s)
	delete(whole, "like")
	for _, keyword := range []string{"items", "additionalProperties"} {
		if within, ok := whole[keyword]; ok {
			whole[keyword] = c.spell(within)
		}
	}
	if properties, ok := whole["properties"].(Object); ok {
		spelt := make(Object)
		for name, property := range properties {
			spelt[name] = c.spell(property)
		}
		whole["properties"] = spelt
	}
	return whole
}

// OpenAPI makes the OpenAPI 3.1 document out of the route table: no route, parameter or refusal stands in it
// that is not there. It asks for a key where keys are in force.
func (s *Server) OpenAPI(routes []Route, c Contract) []byte {
	d := document31{Server: s, Contract: &c, schemas: maps.Clone(c.Schemas),
		keys: s.Keys != nil && !s.Keys.Empty()}
	d.schemas["Problem"] = s.problemSchema()
	paths := make(Object)
	for _, r := range routes {
		item, _ := paths[r.Path].(Object)
		if item == nil {
			item = make(Object)
			paths[r.Path] = item
		}
		item[strings.ToLower(r.Method)] = d.operation(&r)
	}
	components := Object{"schemas": d.schemas, "responses": refusals, "headers": headers}
	whole := Object{
		"openapi": "3.1.0",
		"info":    Object{"title": c.Title, "version": c.Version, "description": c.Description},
		"servers": []any{Object{"url": "/", "description": "Where this document is from."}},
		"tags":    c.Tags, "paths": paths, "security": []any{}, "components": components,
	}
	if d.keys {
		whole["security"] = []any{Object{"key": []string{}}}
		components["securitySchemes"] = Object{"key": Object{"type": "http", "scheme": "bearer",
			"description": "An API key. Each operation names the scope that the key must have."}}
	}
	text, err := json.MarshalIndent(whole, "", " ")
	if err != nil {
		panic(err)
	}
	return text
}

// document31 is a document in the making.
type document31 struct {
	*Server
	*Contract
	schemas Object // those of bodies are added
	keys    bool   // are in force
}

func ref(kind, name string) Object { return Object{"$ref": "#/components/" + kind + "/" + name} }

// operation is one route in the document.
func (d *document31) operation(r *Route) Object {
	is, known := d.Operations[r.Method+" "+r.Path]
	if !known || is.ID == "" {
		panic("contract: no operation " + r.Method + " " + r.Path)
	}
	operation := Object{"operationId": is.ID, "tags": []string{is.Tag}, "summary": r.Doc.Summary,
		"description": is.Description}
	var parameters []any
	if r.Doc.ID != "" {
		_, in, _ := strings.Cut(r.Path, "{")
		in, _, _ = strings.Cut(in, "}")
		schema := d.Schemas[r.Doc.ID].(Object)
		parameters = append(parameters, Object{"name": in, "in": "path", "required": true,
			"schema": ref("schemas", r.Doc.ID), "description": schema["description"],
			"example": schema["examples"].([]any)[0]})
	}
	for _, name := range r.Doc.Query {
		parameters = append(parameters, d.parameter(name, "query", slices.Contains(r.Doc.Required, name)))
	}
	for _, name := range is.Headers {
		parameters = append(parameters, d.parameter(name, "header", false))
	}
	if r.Doc.Body != nil {
		parameters = append(parameters, d.parameter("Idempotency-Key", "header", false))
		operation["requestBody"] = Object{"required": true,
			"content": content("json", ref("schemas", d.body(r, is.ID)))}
	}
	if len(parameters) > 0 {
		operation["parameters"] = parameters
	}
	operation["responses"] = d.responses(r)
	if r.Scope == gate.Open {
		operation["security"] = []any{}
	} else if d.keys {
		operation["description"] = fmt.Sprintf("%s The key needs the scope %v.", is.Description, r.Scope)
	}
	return operation
}

// parameter is one of a query or a header. Its description and example stand beside its schema, where
// generators look for them.
func (d *document31) parameter(name, in string, required bool) Object {
	schema, known := d.Parameters[name].(Object)
	if !known {
		panic("contract: no parameter " + name)
	}
	schema = maps.Clone(schema)
	p := Object{"name": name, "in": in, "required": required, "description": schema["description"],
		"example": schema["examples"].([]any)[0]}
	delete(schema, "description")
	delete(schema, "examples")
	p["schema"] = schema
	if in == "query" && !required {
		p["allowEmptyValue"] = true // as if it were left out (Query)
	}
	return p
}

// body adds the schema of an operation's body, and returns its name.
func (d *document31) body(r *Route, operationID string) (name string) {
	properties := make(Object)
	for _, field := range r.Doc.Body.Fields {
		properties[field] = d.Fields[cmp.Or(r.Doc.As[field], field)]
	}
	name = strings.ToUpper(operationID[:1]) + operationID[1:] + "Request"
	required := append([]string{}, r.Doc.Required...) // in JSON a list, also where it is empty
	d.schemas[name] = Object{"type": "object", "description": r.Doc.Summary + ".", "properties": properties,
		"required": required, "additionalProperties": false}
	return name
}

// responses is what the route answers, by status. A refusal names its codes.
func (d *document31) responses(r *Route) Object {
	status := cmp.Or(r.Status, http.StatusOK)
	forms := content("json", ref("schemas", r.Doc.Answer))
	for kind, schema := range r.Doc.Forms {
		forms[kind] = Object{"schema": ref("schemas", schema)}
	}
	sent := []string{"X-Request-Id"}
	if r.Scope != gate.Open {
		sent = append(sent, "RateLimit", "RateLimit-Policy")
	}
	if slices.Contains(r.Doc.Query, "cursor") {
		sent = append(sent, "Link")
	}
	if r.Doc.Body != nil {
		sent = append(sent, "Idempotent-Replayed")
	}
	if status == http.StatusCreated {
		sent = append(sent, "Location")
	}
	answers := Object{strconv.Itoa(status): Object{"description": "Done.", "content": forms,
		"headers": headersOf(sent...)}}
	codes := make(map[int][]string)
	for _, code := range r.refusals() {
		status := d.problem(code).Status
		codes[status] = append(codes[status], code)
	}
	names := map[int]string{http.StatusUnauthorized: "Unauthenticated",
		http.StatusTooManyRequests: "TryLater", http.StatusServiceUnavailable: "TryLater"}
	for status, list := range codes {
		slices.Sort(list)
		answer := ref("responses", cmp.Or(names[status], "Refused"))
		answer["description"] = strings.Join(list, ", ") // in place of the component's
		answers[strconv.Itoa(status)] = answer
	}
	return answers
}

const requestIDExample = "LGSOBFFZFDQTLNYUWZJ5JZSFPL"

// headers are those that answers have. What all answers of the web have, and what no client reads, is left
// out.
var headers = func() Object {
	header := func(description, example string, required bool) Object {
		return Object{"description": description, "required": required,
			"schema": Object{"type": "string"}, "example": example}
	}
	retry := header("Seconds to wait for.", "", true)
	retry["schema"], retry["example"] = Object{"type": "integer", "minimum": 1}, 1
	replayed := header("There, where an earlier request with this key was answered so.", "true", false)
	replayed["schema"] = Object{"type": "string", "enum": []string{"true"}}
	return Object{
		"X-Request-Id": header("The request's own, if it is well-formed, else one of ours; the log has it.",
			requestIDExample, true),
		"RateLimit": header("What is left to this client, while there is a limit "+
			"(draft-ietf-httpapi-ratelimit-headers-10).", `"default";r=199;t=1`, false),
		"RateLimit-Policy": header("The limit, while there is one.", `"default";q=200;w=2`, false),
		"Link": header("The next page, a relative URL; left out on the last one.",
			`</v1/wallets?limit=50&cursor=dy41MC4x>; rel="next"`, false),
		"Location":            header("What was made.", "/v1/wallets/1", true),
		"Idempotent-Replayed": replayed,
		"Retry-After":         retry,
		"WWW-Authenticate":    header("How to authenticate.", "Bearer", true),
	}
}()

func headersOf(names ...string) Object {
	of := make(Object)
	for _, name := range names {
		of[name] = ref("headers", name)
	}
	return of
}

// refusals are the answers that carry a problem: of one shape, so that a client has one type for them.
var refusals = func() Object {
	refusal := func(description string, more ...string) Object {
		return Object{"description": description,
			"content": content("problem+json", ref("schemas", "Problem")),
			"headers": headersOf(append(more, "X-Request-Id", "RateLimit", "RateLimit-Policy")...)}
	}
	return Object{
		"Refused":         refusal("A clear no: nothing was done, except where the code is internal."),
		"Unauthenticated": refusal("No valid API key.", "WWW-Authenticate"),
		"TryLater":        refusal("Send the same again after Retry-After.", "Retry-After"),
	}
}()

// problemSchema is that of every refusal, with the codes of all.
func (s *Server) problemSchema() Object {
	text := func(description, example string) Object {
		return Object{"type": "string", "description": description, "examples": []string{example}}
	}
	code := text("What programs read: it is stable.", "insufficient_funds")
	code["enum"] = slices.Sorted(maps.Keys(s.Problems))
	const detail = "Wallet 1 has 5 available, less than the amount. Deposit first."
	return Object{
		"type": "object", "description": "An RFC 9457 document.", "additionalProperties": false,
		"required": []string{"type", "title", "status", "code", "detail", "error", "request_id"},
		"properties": Object{
			"type":  text("There is no page about it.", "about:blank"),
			"title": text("What all problems of this code have in common.", "Insufficient funds"),
			"status": Object{"type": "integer", "description": "That of the answer.",
				"examples": []int{422}},
			"code":       code,
			"detail":     text("A sentence that says what to do.", detail),
			"error":      text("The detail again, for older clients.", detail),
			"request_id": text("It leads to the request in the log: X-Request-Id.", requestIDExample),
			"operation": Object{"type": "integer", "minimum": 0, "examples": []int{1},
				"description": "Where the problem is one of a batch's operations: which, from 0."},
		},
	}
}

func content(kind string, schema Object) Object {
	return Object{"application/" + kind: Object{"schema": schema}}
}
