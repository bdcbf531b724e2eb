#!/usr/bin/env python3
"""Writes the tables of facts beside this file from Kubernetes' own documents (discovery, OpenAPI, table columns, protobuf
numbers).

    apimachinery/facts/generate.py [path of the documents, default ../shared/kubernetes-1.36]

  kinds.txt    every group and every generally available kind that a server has, with its resource and subresources, the
               versions that are off unless asked for, and of those versions the kinds that can be switched on
  schema.txt   every type that can be reached from those kinds: its fields, their types and merge facts, protobuf numbers
  columns.txt  the columns of `as=Table`, per kind
  docs.gz      what OpenAPI says beyond that: descriptions, of parameters too, and which fields have a zero as their default
"""
import gzip
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2] / "shared/kubernetes-1.36"
GA = re.compile(r"^v\d+$")
# Versions that are off by default and can be switched on.
OFFERED = {("certificates.k8s.io", "v1beta1")}

# Where kube-apiserver keeps a resource in etcd when that is not the resource's own name.
STORAGE = {
    ("", "nodes"): "minions",
    ("", "services"): "services/specs",
    ("", "endpoints"): "services/endpoints",
    ("", "replicationcontrollers"): "controllers",
    ("networking.k8s.io", "ingresses"): "ingress",
    ("apiextensions.k8s.io", "customresourcedefinitions"): "apiextensions.k8s.io/customresourcedefinitions",
    ("apiregistration.k8s.io", "apiservices"): "apiregistration.k8s.io/apiservices",
}

# Types that are values of their own in the table's language.
SCALARS = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "intstr",
    "io.k8s.apimachinery.pkg.apis.meta.v1.Time": "time",
    "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime": "microtime",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1": "fields",
    "io.k8s.apimachinery.pkg.apis.meta.v1.Patch": "json",
    "io.k8s.apimachinery.pkg.runtime.RawExtension": "raw",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON": "json",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray": "schema-or-list",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool": "schema-or-bool",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray": "schema-or-strings",
}
PREFIXES = [
    "io.k8s.apimachinery.pkg.apis.",
    "io.k8s.apiextensions-apiserver.pkg.apis.",
    "io.k8s.kube-aggregator.pkg.apis.",
    "io.k8s.apimachinery.pkg.",
    "io.k8s.api.",
]


def load(path):
    return json.loads((SOURCE / path).read_text())


def short(name):
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix):]
    raise SystemExit(f"unknown family of type: {name}")


def type_of(node):
    if "$ref" in node:
        name = node["$ref"].removeprefix("#/definitions/")
        return SCALARS.get(name) or short(name)
    kind, form = node.get("type"), node.get("format")
    if kind == "array":
        return "[]" + type_of(node["items"])
    if kind == "object":
        return "{}" + type_of(node["additionalProperties"]) if "additionalProperties" in node else "json"
    return {
        ("string", None): "string",
        ("string", "byte"): "bytes",
        ("boolean", None): "bool",
        ("integer", "int32"): "int32",
        ("integer", "int64"): "int64",
        ("number", "double"): "double",
    }[(kind, form)]


def groups_and_kinds():
    by_kind = {}
    for name, node in load("openapi/swagger.json")["definitions"].items():
        for gvk in node.get("x-kubernetes-group-version-kind", []):
            by_kind[(gvk["group"], gvk["version"], gvk["kind"])] = short(name)
    groups = [("", ["v1"], [])]
    for group in load("discovery/apis.json")["groups"]:
        versions = [v["version"] for v in group["versions"]]
        groups.append((group["name"], list(filter(GA.match, versions)), [v for v in versions if not GA.match(v)]))
    kinds, lines = [], []
    for group, versions, off in groups:
        if versions:
            lines.append(f"group {group or '-'} {','.join(versions)}")
        if off:
            lines.append(f"off {group} {','.join(off)}")
        for version in versions + [v for v in off if (group, v) in OFFERED]:
            path = f"discovery/apis__{group}__{version}.json" if group else "discovery/api__v1.json"
            resources = load(path)["resources"]
            for r in [r for r in resources if "/" not in r["name"]]:
                kinds.append((group, version, r["kind"]))
                storage = STORAGE.get((group, r["name"]), r["name"])
                lines.append(" ".join([
                    "kind", version, r["kind"], r["name"], r["singularName"],
                    "namespaced" if r["namespaced"] else "cluster", storage,
                    ",".join(r["verbs"]), ",".join(r.get("shortNames", [])) or "-",
                    ",".join(r.get("categories", [])) or "-", r.get("storageVersionHash", "-"),
                    by_kind[(group, version, r["kind"])],
                ]))
                for s in [s for s in resources if s["name"].startswith(r["name"] + "/")]:
                    sub_group = s.get("group", group if s.get("version") is None else s.get("group", ""))
                    sub_version = s.get("version", version)
                    kinds.append((sub_group, sub_version, s["kind"]))
                    lines.append(" ".join(["sub", s["name"].split("/", 1)[1], sub_group or "-", sub_version, s["kind"],
                                           ",".join(s["verbs"])]))
    return kinds, lines


def defaults():
    """type -> field -> default, from OpenAPI v3 (v2 has none). Zero values are what Go gives anyway: left out, save that `{}`
    tells a struct from a pointer to one."""
    found = {}
    for path in sorted((SOURCE / "openapi/v3").iterdir()):
        for name, schema in json.loads(path.read_text()).get("components", {}).get("schemas", {}).items():
            for field, node in schema.get("properties", {}).items():
                if node.get("default") not in (None, "", 0, False):
                    found.setdefault(name, {})[field] = node["default"]
    return found


def proto_name(name):
    return "k8s.io." + name.removeprefix("io.k8s.").replace("-", "_")


def numbers(messages, message, field, properties, depth=3):
    """The path of protobuf field numbers to a JSON field: longer than one where Go inlines a struct (Volume's source)."""
    fields = messages.get(message, {})
    for own, facts in fields.items():
        if own.lower() == re.sub("[-$]", "", field).lower():
            wrapped = messages.get(facts.get("type", ""), {}) if properties[field].get("type") == "array" else {}
            # A list that is no `repeated` field is wrapped in a message of its own.
            inner = [wrapped["items"]["number"]] if not facts.get("repeated") and "items" in wrapped else []
            return [facts["number"]] + inner
    for outer, facts in fields.items() if depth > 1 else ():
        if outer not in properties and facts.get("type", "") in messages and not facts.get("repeated"):
            rest = numbers(messages, facts["type"], field, properties, depth - 1)
            if rest:
                return [facts["number"]] + rest
    return []


META = "io.k8s.apimachinery.pkg.apis.meta.v1."


def type_definitions():
    """The definitions of OpenAPI v2, and the types that it leaves out."""
    definitions = load("openapi/swagger.json")["definitions"]
    text, ref = {"type": "string"}, lambda name: {"$ref": "#/definitions/" + META + name}
    partial = {"apiVersion": text, "kind": text, "metadata": ref("ObjectMeta")}
    definitions[META + "PartialObjectMetadata"] = {"properties": partial}
    items = {"type": "array", "items": ref("PartialObjectMetadata")}
    definitions[META + "PartialObjectMetadataList"] = {
        "properties": {**partial, "metadata": ref("ListMeta"), "items": items}, "required": ["items"]}
    return definitions


def schema_lines(kinds):
    definitions = type_definitions()
    messages = load("protobuf-fields.json")
    default = defaults()
    by_kind = {}
    for name, node in definitions.items():
        for gvk in node.get("x-kubernetes-group-version-kind", []):
            by_kind.setdefault((gvk["group"], gvk["version"], gvk["kind"]), name)
    wanted, queue = set(), []
    for group, version, kind in kinds:
        for suffix in ("", "List"):
            name = by_kind.get((group, version, kind + suffix))
            if name:
                queue.append(name)
            elif not suffix and not kind.endswith("Options"):
                raise SystemExit(f"no schema for {group}/{version} {kind}")
    for extra in ("Status", "DeleteOptions", "LabelSelector", "APIGroup", "APIGroupList", "APIResourceList", "APIVersions",
                  "PartialObjectMetadata", "PartialObjectMetadataList", "WatchEvent"):
        queue.append(META + extra)
    queue.append("io.k8s.apimachinery.pkg.version.Info")
    while queue:
        name = queue.pop()
        if name in wanted or name in SCALARS:
            continue
        wanted.add(name)
        refs = re.findall(r'"\$ref": "#/definitions/([^"]+)"', json.dumps(definitions[name]))
        queue.extend(refs)
    lines = []
    for name in sorted(wanted, key=short):
        node = definitions[name]
        gvks = node.get("x-kubernetes-group-version-kind", [])
        head = ["type", short(name)]
        if len(gvks) == 1:
            head.append(f"gvk={gvks[0]['group']}/{gvks[0]['version']}/{gvks[0]['kind']}")
        if node.get("x-kubernetes-map-type") == "atomic":
            head.append("atomic")
        lines.append(" ".join(head))
        required = node.get("required", [])
        for field, p in sorted(node.get("properties", {}).items()):
            words = [field, type_of(p)]
            path = numbers(messages, proto_name(name), field, node["properties"])
            words.append("#" + ".".join(map(str, path)) if path else "-")
            if field in required:
                words.append("required")
            if p.get("x-kubernetes-list-type"):
                words.append("list=" + p["x-kubernetes-list-type"])
            if p.get("x-kubernetes-list-map-keys"):
                words.append("keys=" + ",".join(p["x-kubernetes-list-map-keys"]))
            if p.get("x-kubernetes-map-type") == "atomic":
                words.append("atomic")
            if p.get("x-kubernetes-patch-merge-key"):
                words.append("merge=" + p["x-kubernetes-patch-merge-key"])
            if p.get("x-kubernetes-patch-strategy"):
                words.append("strategy=" + p["x-kubernetes-patch-strategy"])
            if default.get(name, {}).get(field) == {}:
                words.append("inline")
            elif field in default.get(name, {}):
                words.append("default=" + json.dumps(default[name][field]))
            lines.append(" " + " ".join(words))
    return lines


def column_lines(kinds):
    """Columns are listed under Kubernetes' internal group names: `api` is the core group, others a prefix of the group."""
    lines, pairs = [], {(g, k) for g, _, k in kinds}
    for name, columns in load("table-columns.json").items():
        family, kind = name.split(".")
        family = {"api": "", "nodeapi": "node", "metav1": ""}.get(family, family)
        groups = [g for g, k in pairs if k == kind and (g.split(".")[0] == family or (family == "" and g == ""))]
        if kind == "Status":
            groups = [""]
        for group in sorted(groups):
            lines.append(f"table {group or '-'} {kind}")
            for c in columns:
                lines.append("|".join([" " + c["name"], c["type"], c.get("format", ""), str(c["priority"])]))
    return lines


def doc_lines(types):
    """A line a type (name, description, extensions), a line a field below it (name, marks, description), and the same for
    parameters. Marks: `z` its default is zero, `l` it says how its list is merged, `g` it says that its map is granular."""
    lines, seen = [], set()
    escape = lambda text: text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    parameters, options = {}, {}
    for path in sorted((SOURCE / "openapi/v3").iterdir()):
        document = json.loads(path.read_text())
        schemas = document.get("components", {}).get("schemas", {})
        for name in sorted(schemas):
            node = schemas[name]
            if name in seen or not (short(name) in types or name in SCALARS):
                continue
            seen.add(name)
            unions = node.get("x-kubernetes-unions")
            lines.append("\t".join(["type", short(name), escape(node.get("description", "")),
                                    json.dumps(unions, separators=(",", ":")) if unions else ""]))
            for field, p in sorted(node.get("properties", {}).items()):
                marks = "z" if p.get("default") in ("", 0, False, {}) and "default" in p else ""
                marks += "l" if "x-kubernetes-list-type" in p else ""
                marks += "g" if p.get("x-kubernetes-map-type") == "granular" else ""
                lines.append("\t".join([field, marks, escape(p.get("description", ""))]))
        for route, item in document.get("paths", {}).items():
            if not GA.match(route.split("/")[2 if route.startswith("/api/") else min(3, route.count("/"))]):
                continue
            for verb, operation in item.items():
                if verb == "parameters":
                    continue
                kind = operation.get("x-kubernetes-group-version-kind", {}).get("kind", "")
                for p in item.get("parameters", []) + operation.get("parameters", []):
                    name = "fieldManager of patch" if p["name"] == "fieldManager" and verb == "patch" else p["name"]
                    line = "\t".join([p["name"], p["schema"]["type"], escape(p.get("description", ""))])
                    if operation.get("x-kubernetes-action") == "connect" or route.endswith("/log"):
                        if p["in"] == "query":
                            options.setdefault(kind if kind.endswith("Options") else "PodLogOptions", {})[name] = line
                    elif name != "name":
                        parameters[name] = line.replace(p["name"], name, 1)
    for name, fields in [("parameters", parameters)] + sorted(options.items()):
        lines.append("\t".join(["type", name, "", ""]))
        lines += [fields[field] for field in sorted(fields)]
    return lines


def main():
    kinds, kind_lines = groups_and_kinds()
    schema = schema_lines(kinds)
    for path, lines in (("kinds.txt", kind_lines), ("schema.txt", schema), ("columns.txt", column_lines(kinds))):
        (HERE / path).write_text("\n".join(lines) + "\n")
        print(path, len(lines), "lines")
    docs = doc_lines({line.split()[1] for line in schema if line.startswith("type ")})
    (HERE / "docs.gz").write_bytes(gzip.compress("\n".join(docs).encode(), 9, mtime=0))
    print("docs.gz", len(docs), "lines")


main()
