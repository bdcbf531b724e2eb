use super::{Env, Type, is_identifier};
use proptest::prelude::*;

fn env() -> Env {
    let known =
        Type::Variables([("known".to_owned(), Type::Int), ("names".to_owned(), Type::list(Type::String))].into());
    let mut env = Env::of_requests(&Type::Dyn).and("params", Type::Dyn).and("variables", known);
    env.variables.extend(Env::of_devices().variables);
    env.variables.extend(["self", "a", "b", "c"].map(|name| (name, Type::Dyn)));
    Env { patches: true, bind: true, ..env }
}

#[test]
fn expressions_have_the_types_of_their_parts() {
    let env = env();
    for (expression, kind) in [
        ("1 + 2", "int"),
        ("object.a + 1", "int"),
        ("object.a + object.b", "dyn"),
        ("object.a > 1 && variables.known < 2.5", "bool"),
        ("[1, 2].map(x, string(x))", "list(string)"),
        ("variables.names.filter(n, n != 'a')", "list(string)"),
        ("{'a': [1u]}", "map(string, list(uint))"),
        ("[]", "list(dyn)"),
        ("[] + [1]", "list(int)"),
        ("null", "null_type"),
        ("request.userInfo.groups", "list(string)"),
        ("request.userInfo.extra['a'][0]", "string"),
        ("namespaceObject.metadata.creationTimestamp", "google.protobuf.Timestamp"),
        ("timestamp('2024-01-01T00:00:00Z') - timestamp(0)", "google.protobuf.Duration"),
        ("object.?spec.?replicas", "optional_type(dyn)"),
        ("request.?name.orValue('x')", "string"),
        ("variables.names[?0].optMap(n, size(n)).orValue(0)", "int"),
        ("optional.of(1).or(optional.none())", "optional_type(int)"),
        ("cel.bind(x, [1], x + [2])", "list(int)"),
        ("authorizer.group('').resource('pods').namespace('x').check('get').allowed()", "bool"),
        ("authorizer.requestResource.check('get').reason()", "string"),
        ("quantity('1').add(quantity('2'))", "kubernetes.Quantity"),
        ("device.attributes['a'].b", "google.protobuf.Any"),
        ("device.capacity['a'].b.isGreaterThan(quantity('1'))", "bool"),
        ("true ? 1 : object.a", "dyn"),
        ("type(1) == int", "bool"),
        ("url('https://a').getQuery()['b'][0]", "string"),
        ("[1, 2].all(i, v, i < v)", "bool"),
        ("{'a': 1}.transformMap(k, v, v > 0, k)", "map(string, string)"),
        ("{'a': 1}.transformList(k, v, v)", "list(int)"),
        ("[3, 1].sortBy(x, -x).max()", "int"),
        ("'%s'.format(['a'])", "string"),
        ("[JSONPatch{op: 'add', path: '/a', value: 1}]", "list(JSONPatch)"),
        ("has(object.a) ? [JSONPatch{op: 'add'}] : []", "list(JSONPatch)"),
        ("Object{spec: Object.spec{replicas: 1}}", "Object"),
        ("format.dns1123Label().validate('a').value()[0]", "string"),
        ("size('a') in [1, 2] && 'a' in {'a': 1}", "bool"),
        ("object.x == null && request.options == null", "bool"),
        ("1 == 1 ? duration('1h') : duration('-5m')", "google.protobuf.Duration"),
    ] {
        assert_eq!(env.compile(expression).map(|kind| kind.to_string()), Ok(kind.to_owned()), "{expression}");
    }
}

#[test]
fn what_people_write_is_understood() {
    let env = env();
    for expression in [
        "!has(object.spec.test) || object.spec.test == 'x'",
        "'foo' in object.metadata.labels ? object.metadata.labels['foo'] == 'a' : false",
        "has(object.expired) && object.created + object.ttl < object.expired",
        "type(self) == string ? self == '99%' : self == 42",
        "self.set1.all(e, !(e in self.set2))",
        "size(self.names) == size(self.details) && self.names.all(n, n in self.details)",
        "request.userInfo.groups.exists(g, g == 'system:masters') && request.operation == 'UPDATE'",
        "!(request.resource.group == 'coordination.k8s.io' && request.resource.resource == 'leases')",
        "request.dryRun != true && request.subResource == '' && request.requestKind.kind == 'Pod'",
        "'environment' in namespaceObject.metadata.labels && namespaceObject.metadata.labels['environment'] == 'prod'",
        "('must be no greater than ' + string(params.max) + object.metadata.name).size() > 1",
        "object.spec.containers.map(c, c.image).join(',') == 'a'",
        "object.?metadata.?labels[?'a'].orValue('') != '' && object.list[?0].hasValue()",
        "[object.spec.?replicas.orValue(1), 2].max() > 1",
        "object.spec.containers.all(c, quantity(c.resources.limits['memory']).isLessThan(quantity('1Gi')))",
        "oldObject == null || object.spec.x == oldObject.spec.x",
        "ip(object.spec.ip).family() == 4 && cidr('10.0.0.0/8').containsIP(object.spec.ip)",
        "object.s.split(',').all(x, x.size() > 0) && object.s.find('[0-9]+') != ''",
        "'%s is %d'.format([object.a, object.b]) == '' && sets.contains(['a'], object.list)",
        "timestamp(object.t) < timestamp('2024-01-01T00:00:00Z') + duration('1h') && object.t.getFullYear() > 2020",
        "semver(object.v).isGreaterThan(semver('1.0.0')) && isQuantity(object.q)",
        "object.spec.replicas % 2 == 0 && -object.x < 0 && object.y in ['a', 'b']",
        "object.spec.selector == object.spec.template.metadata.labels",
        "variables.names.exists_one(n, n.lowerAscii() == 'a') && variables.names.isSorted()",
        "url(object.u).getHost() == 'x' && isURL(object.u) && url(object.u).getQuery()['a'].exists(v, v == 'b')",
        "!format.dns1123Subdomain().validate(object.name).hasValue()",
        "object.metadata.ownerReferences.filter(r, r.controller)[0].name == 'x'",
        "device.driver == 'gpu.example.com' && device.attributes['gpu.example.com'].memory.isGreaterThan(quantity('10Gi'))",
        "cel.bind(dra, device.attributes['dra.example.com'], dra.oneBool && dra.anotherBool)",
        "'dra.example.com' in device.attributes && 'x' in device.attributes['dra.example.com']",
    ] {
        assert_eq!(env.compile(expression).map(|kind| kind.to_string()), Ok("bool".to_owned()), "{expression}");
    }
    for (expression, kind) in [
        (
            "Object{spec: Object.spec{initContainers: [Object.spec.initContainers{name: 'p', args: ['a', 'b']}]}}",
            "Object",
        ),
        (
            "has(object.metadata.labels) ? [] : [JSONPatch{op: 'add', path: '/metadata/labels', value: {}}]",
            "list(JSONPatch)",
        ),
        (
            "[JSONPatch{op: 'add', path: '/metadata/labels/' + jsonpatch.escapeKey('a/b'), value: 'x'}] + [JSONPatch{op: 'remove', path: '/a'}]",
            "list(JSONPatch)",
        ),
    ] {
        assert_eq!(env.compile(expression).map(|kind| kind.to_string()), Ok(kind.to_owned()), "{expression}");
    }
}

#[test]
fn what_does_not_fit_is_told_as_cel_go_tells_it() {
    let env = env();
    let mut wrong = Vec::new();
    for (expression, why) in [
        (
            "object.x == nobody",
            "1:13: undeclared reference to 'nobody' (in container '')\n | object.x == nobody\n | ............^",
        ),
        (
            "object.x == 1 &&\n  variables.gone > 1",
            "2:12: undefined field 'gone'\n |   variables.gone > 1\n | ...........^",
        ),
        ("[1].all(x, y > x)", "1:12: undeclared reference to 'y' (in container '')"),
        ("[1].all(x, true) && x > 1", "1:21: undeclared reference to 'x' (in container '')"),
        ("1 + 'a'", "1:3: found no matching overload for '_+_' applied to '(int, string)'\n | 1 + 'a'\n | ..^"),
        ("'a' > 1 // why", "1:5: found no matching overload for '_>_' applied to '(string, int)'"),
        ("foo(1)", "1:4: undeclared reference to 'foo' (in container '')\n | foo(1)\n | ...^"),
        ("object.foo(1)", "1:11: undeclared reference to 'foo' (in container '')"),
        ("'a'.startsWith(1)", "1:15: found no matching overload for 'startsWith' applied to 'string.(int)'"),
        ("request.nope", "1:8: undefined field 'nope'"),
        ("has(request.nope)", "1:4: undefined field 'nope'"),
        ("'a'.b", "1:4: type 'string' does not support field selection"),
        ("[1, 'a']", "1:5: expected type 'int' but found 'string'"),
        (
            "1.all(x, true)",
            "1:1: expression of type 'int' cannot be range of a comprehension (must be list, map, or dynamic)",
        ),
        ("[1].all(x, x)", "1:8: found no matching overload for '_&&_' applied to '(bool, int)'"),
        ("[1].map(x, 1, x)", "1:8: found no matching overload for '_?_:_' applied to '(int, list(int), list(int))'"),
        ("Foo{a: 1}", "1:4: undeclared reference to 'Foo' (in container '')"),
        ("JSONPatch{op: 1}", "1:13: expected type of field 'op' is 'string' but provided type is 'int'"),
        ("JSONPatch{on: 1}", "1:13: undefined field 'on'"),
        ("duration('x') > duration('1h')", "1:10: invalid duration argument"),
        ("timestamp('x') == object.t", "1:11: invalid timestamp argument"),
        ("'a'.matches('(')", "1:13: invalid matches argument"),
        ("null == 1", "1:6: found no matching overload for '_==_' applied to '(null, int)'"),
        ("!1", "1:1: found no matching overload for '!_' applied to '(int)'"),
        (
            "authorizer.check('get')",
            "1:17: found no matching overload for 'check' applied to 'kubernetes.authorization.Authorizer.(string)'",
        ),
        ("{'a': 1}[1]", "1:9: found no matching overload for '_[_]' applied to '(map(string, int), int)'"),
        (
            "x && y",
            "1:1: undeclared reference to 'x' (in container '')\n | x && y\n | ^\nERROR: <input>:1:6: undeclared reference to 'y' (in container '')",
        ),
    ] {
        let told = env.compile(expression).map(|kind| kind.to_string());
        let expected = format!("ERROR: <input>:{why}");
        if !told.as_ref().is_err_and(|told| told.starts_with(&expected)) {
            wrong.push((expression, why, told));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn objects_of_the_api_have_fields_with_types() {
    let deployment = Type::of_kind("apps", "v1", "Deployment").unwrap();
    let env = Env::of_requests(&deployment);
    for (expression, kind) in [
        ("object.spec.replicas", "int"),
        ("object.metadata.labels['a']", "string"),
        ("object.spec.template.spec.containers.all(c, c.image.startsWith('a'))", "bool"),
        ("object.spec.strategy.rollingUpdate.maxSurge", "dyn"),
        ("object.metadata.creationTimestamp < oldObject.metadata.creationTimestamp", "bool"),
        ("object.metadata.__namespace__", "string"),
    ] {
        assert_eq!(env.compile(expression).map(|kind| kind.to_string()), Ok(kind.to_owned()), "{expression}");
    }
    for (expression, why) in [
        ("object.spec.replicas > '1'", "found no matching overload for '_>_' applied to '(int, string)'"),
        ("object.spec.maxReplicas > 1", "undefined field 'maxReplicas'"),
        ("object.metadata.namespace == 'a'", "undefined field 'namespace'"),
    ] {
        let told = env.compile(expression).unwrap_err();
        assert!(told.contains(why), "{expression}: {told}");
    }
}

#[test]
fn what_an_expression_costs_at_most_is_known_before_it_is_evaluated() {
    let env = Env::of_devices();
    let cost = |expression: &str| env.weigh(expression).unwrap().1;
    for (expression, most) in [
        ("true", 0),
        ("1 + 2 == 3", 2),
        ("device.driver", 2),
        ("device.driver == 'a.example.com'", 4),
        // Looked up: a name, a field, a key, a field; compared with few letters.
        ("device.attributes['a'].model == 'x'", 5),
        ("device.attributes['a'].model == 'x' && device.driver == 'y'", 8),
        ("device.driver.startsWith('abcdefghijk')", 4),
        ("device.driver.matches('[a-z]+')", 2 + 7 * 2),
        ("[1, 2, 3].all(x, x > 1)", 10 + 1 + 3 * (2 + 1 + 2)),
        ("device.capacity['a'].b.isGreaterThan(quantity('1'))", 6),
    ] {
        assert_eq!(cost(expression), most, "{expression}");
    }
    let ten = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]";
    let nested = |depth: usize| (0..depth).fold("true".to_owned(), |inner, at| format!("{ten}.all(x{at}, {inner})"));
    assert!(cost(&nested(3)) < 1_000_000 && cost(&nested(6)) > 1_000_000);
    assert!(cost("device.attributes['a'].b.lowerAscii().matches(device.attributes['a'].c)") < 1_000_000);
    assert_eq!(cost("'a'.matches(string(device.attributes['a'].list))"), 4 + 7 + 16, "of at most 64 letters");
    assert!(cost("[1].map(x, dyn(x)).all(y, y == 1)") < 1_000);
}

#[test]
fn expressions_are_well_formed_or_not() {
    let env = env();
    for good in [
        "object.spec.replicas <= params.max && !has(object.metadata.labels)",
        "object.spec.containers.all(c, c.image.startsWith('a/'))",
        "[1, 2].exists(x, x in {1: 'a'})",
        "a ? b : c",
        r#"self.matches("^[a-z]+\\d$")"#,
        "object[?'spec'].hasValue() && {?'a': object.?b}.size() == 0 && [?object.?c] == []",
        "self.all(i, v, i < v) && self.map(x, x > 1, x).size() > 0 && self.exists_one(x, x == 1u)",
        "r'a\\b' + 'c' == \"\"\"d\"\"\" || 0x1F == 31 || 1.5e3 > 2.0 || null == dyn(1)",
        "!has(oldObject.a) // a comment",
        "[1].all(x, [2].exists(y, y > x)) && type(object.x) == string",
    ] {
        assert!(env.compile(good).is_ok(), "{good}: {:?}", env.compile(good));
    }
    for bad in ["", "a b", "object.x >", "(", "'", "a..b", "1 +", "{", "all(x", "... [] bad expression"] {
        assert!(env.compile(bad).is_err(), "{bad}");
    }
}

#[test]
fn hostile_expressions_are_refused_not_recursed_into() {
    let env = env();
    for hostile in ["(".repeat(10_000), "!".repeat(10_000), "[".repeat(16_000), "-".repeat(300), "a".repeat(17_000)] {
        assert!(env.compile(&hostile).is_err());
    }
    assert!(env.compile(&format!("1{}", "+1".repeat(8_000))).is_ok());
    assert!(env.compile(&format!("{}1{}", "(".repeat(50), ")".repeat(50))).is_ok());
}

#[test]
fn identifiers_are_words_that_are_not_taken() {
    assert!(is_identifier("_a1") && !is_identifier("in") && !is_identifier("1a") && !is_identifier(""));
}

proptest! {
    /// Whatever is put together: it has a type, or faults at places of its own text.
    #[test]
    fn nonsense_has_a_type_or_a_fault(parts in prop::collection::vec(prop::sample::select(vec![
        "a", "object", ".", "x", "(", ")", "[", "]", "{", "}", ",", ":", "?", "+", "-", "!", "==", "&&", "in", "1", "2u", "'s'",
        "\"é\"", "null", ".map(x, ", ".all(k, v, ", "has(", "cel.bind(x, ", "[?", ".?", "Object", "\n", "//", "size(",
    ]), 0..14)) {
        let text = parts.concat();
        if let Err(told) = env().weigh(&text) {
            prop_assert!(told.starts_with("ERROR: <input>:"), "{text:?}: {told}");
        }
    }
}
