//! What functions and operators there are: a table of their overloads.

use super::types::Type;
use std::collections::HashMap;
use std::sync::LazyLock;

/// One way to call a function. Unknown types in it count from zero.
#[derive(Debug)]
pub(super) struct Overload {
    /// Called on its first argument: `a.f(b)`.
    pub member: bool,
    pub args: Vec<Type>,
    pub result: Type,
    /// How many types it leaves open.
    pub open: usize,
}

/// A line names functions, and after a colon ways to call them: the arguments' types, `=`, and the result's. One that begins
/// with a dot is called on its first argument. Single capitals stand for any type, the same each time.
const TABLE: &str = "\
_?_:_: bool A A = A
_&&_ _||_: bool bool = bool
!_ @not_strictly_false: bool = bool
_==_ _!=_: A A = bool
_+_: bytes bytes = bytes | double double = double | duration duration = duration | duration timestamp = timestamp | timestamp duration = timestamp | int int = int | list(A) list(A) = list(A) | string string = string | uint uint = uint
_-_: double double = double | duration duration = duration | int int = int | timestamp duration = timestamp | timestamp timestamp = duration | uint uint = uint
_*_ _/_: double double = double | int int = int | uint uint = uint
_%_: int int = int | uint uint = uint
-_: double = double | int = int
_<_ _<=_ _>_ _>=_: bool bool = bool | int int = bool | int double = bool | int uint = bool | uint uint = bool | uint double = bool | uint int = bool | double double = bool | double int = bool | double uint = bool | string string = bool | bytes bytes = bool | timestamp timestamp = bool | duration duration = bool
_[_]: list(A) int = A | map(A,B) A = B | optional(list(A)) int = optional(A) | optional(map(A,B)) A = optional(B)
_[?_]: list(A) int = optional(A) | map(A,B) A = optional(B) | optional(list(A)) int = optional(A) | optional(map(A,B)) A = optional(B)
@in: A list(A) = bool | A map(A,B) = bool
size: bytes = int | list(A) = int | map(A,B) = int | string = int | .bytes = int | .list(A) = int | .map(A,B) = int | .string = int
matches: string string = bool | .string string = bool
contains startsWith endsWith: .string string = bool
int: int = int | double = int | duration = int | string = int | timestamp = int | uint = int
uint: uint = uint | double = uint | int = uint | string = uint
double: double = double | int = double | string = double | uint = double
string: string = string | bool = string | bytes = string | double = string | duration = string | int = string | timestamp = string | uint = string
bytes: bytes = bytes | string = bytes
bool: bool = bool | string = bool
timestamp: timestamp = timestamp | int = timestamp | string = timestamp
duration: duration = duration | int = duration | string = duration
dyn: A = dyn
type: A = type(A)
getFullYear getMonth getDayOfYear getDayOfMonth getDate getDayOfWeek: .timestamp = int | .timestamp string = int
getHours getMinutes getSeconds getMilliseconds: .timestamp = int | .timestamp string = int | .duration = int
optional.of optional.ofNonZeroValue: A = optional(A)
optional.none: = optional(A)
optional.unwrap: list(optional(A)) = list(A)
unwrapOpt: .list(optional(A)) = list(A)
hasValue: .optional(A) = bool
value: .optional(A) = A
or: .optional(A) optional(A) = optional(A)
orValue: .optional(A) A = A
first last: .list(A) = optional(A)
charAt: .string int = string
indexOf lastIndexOf: .string string = int | .string string int = int | .list(A) A = int
lowerAscii upperAscii trim: .string = string
replace: .string string string = string | .string string string int = string
split: .string string = list(string) | .string string int = list(string)
substring: .string int = string | .string int int = string
join: .list(string) = string | .list(string) string = string
format: .string list(dyn) = string
strings.quote: string = string
sets.contains sets.equivalent sets.intersects: list(A) list(A) = bool
isSorted: .list(int) = bool | .list(uint) = bool | .list(double) = bool | .list(bool) = bool | .list(duration) = bool | .list(timestamp) = bool | .list(string) = bool | .list(bytes) = bool
min max: .list(int) = int | .list(uint) = uint | .list(double) = double | .list(bool) = bool | .list(duration) = duration | .list(timestamp) = timestamp | .list(string) = string | .list(bytes) = bytes
sum: .list(int) = int | .list(uint) = uint | .list(double) = double | .list(duration) = duration
slice: .list(A) int int = list(A)
flatten: .list(list(A)) = list(A) | .list(dyn) int = list(dyn)
reverse distinct sort: .list(A) = list(A)
lists.range: int = list(int)
find: .string string = string
findAll: .string string = list(string) | .string string int = list(string)
url: string = kubernetes.URL
isURL isIP isCIDR isQuantity ip.isCanonical: string = bool
getScheme getHost getHostname getPort getEscapedPath: .kubernetes.URL = string
getQuery: .kubernetes.URL = map(string,list(string))
ip: string = net.IP | .net.CIDR = net.IP
family: .net.IP = int
isUnspecified isLoopback isLinkLocalMulticast isLinkLocalUnicast isGlobalUnicast: .net.IP = bool
string: net.IP = string | net.CIDR = string
cidr: string = net.CIDR
containsIP: .net.CIDR string = bool | .net.CIDR net.IP = bool
containsCIDR: .net.CIDR string = bool | .net.CIDR net.CIDR = bool
prefixLength: .net.CIDR = int
masked: .net.CIDR = net.CIDR
format.named: string = optional(kubernetes.NamedFormat)
format.dns1123Label format.dns1123Subdomain format.dns1035Label format.qualifiedName format.dns1123LabelPrefix format.dns1123SubdomainPrefix format.dns1035LabelPrefix format.labelValue format.uri format.uuid format.byte format.date format.datetime: = kubernetes.NamedFormat
validate: .kubernetes.NamedFormat string = optional(list(string))
quantity: string = kubernetes.Quantity
sign: kubernetes.Quantity = int | .kubernetes.Quantity = int
asInteger: .kubernetes.Quantity = int
asApproximateFloat: .kubernetes.Quantity = double
isInteger: .kubernetes.Quantity = bool
isGreaterThan isLessThan: .kubernetes.Quantity kubernetes.Quantity = bool | .kubernetes.Semver kubernetes.Semver = bool
compareTo: .kubernetes.Quantity kubernetes.Quantity = int | .kubernetes.Semver kubernetes.Semver = int
add sub: .kubernetes.Quantity kubernetes.Quantity = kubernetes.Quantity | .kubernetes.Quantity int = kubernetes.Quantity
semver: string = kubernetes.Semver | string bool = kubernetes.Semver
isSemver: string = bool | string bool = bool
major minor patch: .kubernetes.Semver = int
path: .kubernetes.authorization.Authorizer string = kubernetes.authorization.PathCheck
group: .kubernetes.authorization.Authorizer string = kubernetes.authorization.GroupCheck
serviceAccount: .kubernetes.authorization.Authorizer string string = kubernetes.authorization.Authorizer
resource: .kubernetes.authorization.GroupCheck string = kubernetes.authorization.ResourceCheck
subresource namespace name fieldSelector labelSelector: .kubernetes.authorization.ResourceCheck string = kubernetes.authorization.ResourceCheck
check: .kubernetes.authorization.PathCheck string = kubernetes.authorization.Decision | .kubernetes.authorization.ResourceCheck string = kubernetes.authorization.Decision
allowed errored: .kubernetes.authorization.Decision = bool
error reason: .kubernetes.authorization.Decision = string
jsonpatch.escapeKey: string = string";

const META: &[(&str, &str)] = &[
    ("name", "string"),
    ("generateName", "string"),
    ("namespace", "string"),
    ("labels", "map(string,string)"),
    ("annotations", "map(string,string)"),
    ("UID", "string"),
    ("creationTimestamp", "timestamp"),
    ("deletionGracePeriodSeconds", "int"),
    ("deletionTimestamp", "timestamp"),
    ("generation", "int"),
    ("resourceVersion", "string"),
    ("finalizers", "list(string)"),
];

/// Types with fields, by their names.
const STRUCTS: &[(&str, &[(&str, &str)])] = &[
    ("kubernetes.GroupVersionKind", &[("group", "string"), ("version", "string"), ("kind", "string")]),
    ("kubernetes.GroupVersionResource", &[("group", "string"), ("version", "string"), ("resource", "string")]),
    (
        "kubernetes.UserInfo",
        &[("username", "string"), ("uid", "string"), ("groups", "list(string)"), ("extra", "map(string,list(string))")],
    ),
    (
        "kubernetes.AdmissionRequest",
        &[
            ("kind", "kubernetes.GroupVersionKind"),
            ("resource", "kubernetes.GroupVersionResource"),
            ("subResource", "string"),
            ("requestKind", "kubernetes.GroupVersionKind"),
            ("requestResource", "kubernetes.GroupVersionResource"),
            ("requestSubResource", "string"),
            ("name", "string"),
            ("namespace", "string"),
            ("operation", "string"),
            ("userInfo", "kubernetes.UserInfo"),
            ("dryRun", "bool"),
            ("options", "dyn"),
        ],
    ),
    (
        "kubernetes.Namespace",
        &[
            ("metadata", "kubernetes.NamespaceMetadata"),
            ("spec", "kubernetes.NamespaceSpec"),
            ("status", "kubernetes.NamespaceStatus"),
        ],
    ),
    ("kubernetes.NamespaceMetadata", META),
    ("kubernetes.NamespaceSpec", &[("finalizers", "list(string)")]),
    ("kubernetes.NamespaceStatus", &[("conditions", "list(kubernetes.NamespaceCondition)"), ("phase", "string")]),
    (
        "kubernetes.NamespaceCondition",
        &[
            ("status", "string"),
            ("type", "string"),
            ("lastTransitionTime", "timestamp"),
            ("message", "string"),
            ("reason", "string"),
        ],
    ),
    (
        "kubernetes.DRADevice",
        &[
            ("driver", "string"),
            ("attributes", "map(string,map(string,any))"),
            ("capacity", "map(string,map(string,kubernetes.Quantity))"),
            ("allowMultipleAllocations", "bool"),
        ],
    ),
    ("JSONPatch", &[("op", "string"), ("path", "string"), ("from", "string"), ("value", "dyn")]),
];

/// A type as the tables write it.
pub(super) fn parse_type(text: &'static str) -> Type {
    if let Some((outer, inner)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) {
        return match outer {
            "list" => Type::list(parse_type(inner)),
            "optional" => Type::optional(parse_type(inner)),
            "type" => Type::Type(parse_type(inner).into()),
            _ => {
                let (key, value) = inner.split_once(',').unwrap_or((inner, "dyn"));
                Type::map(parse_type(key), parse_type(value))
            }
        };
    }
    match text {
        "dyn" => Type::Dyn,
        "any" => Type::Any,
        "null_type" => Type::Null,
        "bool" => Type::Bool,
        "int" => Type::Int,
        "uint" => Type::Uint,
        "double" => Type::Double,
        "string" => Type::String,
        "bytes" => Type::Bytes,
        "duration" | "google.protobuf.Duration" => Type::Duration,
        "timestamp" | "google.protobuf.Timestamp" => Type::Timestamp,
        "A" => Type::Unknown(0),
        "B" => Type::Unknown(1),
        name => match STRUCTS.iter().find(|(known, _)| *known == name) {
            Some((name, fields)) => Type::Struct(name, fields),
            None => Type::Opaque(name),
        },
    }
}

static FUNCTIONS: LazyLock<HashMap<&str, Vec<Overload>>> = LazyLock::new(|| {
    let mut functions: HashMap<&str, Vec<Overload>> = HashMap::new();
    for line in TABLE.lines() {
        let (names, overloads) = line.rsplit_once(": ").unwrap_or((line, ""));
        for name in names.split(' ') {
            let ways = overloads.split('|').filter_map(|way| way.split_once('='));
            functions.entry(name).or_default().extend(ways.map(|(args, result)| {
                let args = args.trim();
                let plain = args.strip_prefix('.');
                let args: Vec<Type> = plain.unwrap_or(args).split_whitespace().map(parse_type).collect();
                let result = parse_type(result.trim());
                let open = if args.iter().chain([&result]).any(Type::is_open) { 2 } else { 0 };
                Overload { member: plain.is_some(), args, result, open }
            }));
        }
    }
    functions
});

/// The ways to call a function.
pub(super) fn overloads(name: &str) -> Option<&'static [Overload]> {
    FUNCTIONS.get(name).map(Vec::as_slice)
}

/// A type that has a name of its own: what may be compared with `type(x)`.
pub(super) fn type_named(name: &str) -> Option<Type> {
    const NAMED: [&str; 21] = [
        "bool",
        "bytes",
        "double",
        "dyn",
        "google.protobuf.Duration",
        "google.protobuf.Timestamp",
        "int",
        "kubernetes.Quantity",
        "kubernetes.Semver",
        "kubernetes.URL",
        "kubernetes.NamedFormat",
        "kubernetes.authorization.Authorizer",
        "kubernetes.authorization.PathCheck",
        "kubernetes.authorization.GroupCheck",
        "kubernetes.authorization.ResourceCheck",
        "kubernetes.authorization.Decision",
        "net.CIDR",
        "net.IP",
        "null_type",
        "string",
        "uint",
    ];
    let named = match name {
        "list" => Type::list(Type::Dyn),
        "map" => Type::map(Type::Dyn, Type::Dyn),
        "optional_type" => Type::optional(Type::Dyn),
        "type" => Type::Type(Type::Dyn.into()),
        name => parse_type(NAMED.iter().find(|known| **known == name)?),
    };
    Some(Type::Type(named.into()))
}
