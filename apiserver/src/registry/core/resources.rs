//! Names and amounts of resources: in containers, pods, limits, quotas, nodes. As `validateResourceRequirements`,
//! `ValidateResourceQuantityValue` and the helpers that know the names.

use crate::registry::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_qualified_name};
use apimachinery::pod::is_pod_level;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use k8s_openapi::api::core::v1::PodSpec;
use serde_json::Value;

const INTEGERS: [&str; 9] = [
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];
/// As `IsStandardResourceName`.
const STANDARD: [&str; 19] = [
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "replicationcontrollers",
    "services",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "storage",
    "requests.storage",
    "services.nodeports",
];

/// Says what is wrong with a resource's name; the place, the name.
pub type NameCheck = fn(&Field<'_, '_>, &str, &mut Errors);

fn is_hugepages(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// Without a domain, or in Kubernetes' own.
fn is_native(name: &str) -> bool {
    !name.contains('/') || name.contains("kubernetes.io/")
}

/// As `IsExtendedResourceName`.
fn is_extended(name: &str) -> bool {
    !is_native(name) && !name.starts_with("requests.") && is_qualified_name(&format!("requests.{name}")).is_empty()
}

/// As `IsOvercommitAllowed`.
pub fn overcommittable(name: &str) -> bool {
    is_native(name) && !is_hugepages(name)
}

/// As `validateResourceName`.
pub fn name(field: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    let messages = is_qualified_name(name);
    let standard = STANDARD.contains(&name)
        || name == "services.loadbalancers"
        || is_hugepages(name)
        || name.starts_with("requests.hugepages-");
    if messages.is_empty() && !name.contains('/') && !standard {
        errors.invalid_as(field, name, "must be a standard resource type or fully qualified");
    }
    for message in messages {
        errors.invalid_as(field, name, message);
    }
}

/// As `validateContainerResourceName`.
pub fn container_name(field: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    // By far the most frequent ones.
    if matches!(name, "cpu" | "memory" | "ephemeral-storage") {
        return;
    }
    self::name(field, name, errors);
    if !name.contains('/') {
        if !is_hugepages(name) {
            errors.invalid_as(field, name, "must be a standard resource for containers");
        }
    } else if !is_native(name) && !is_extended(name) {
        errors.invalid_as(field, name, "doesn't follow extended resource name standard");
    }
}

/// As `validatePodResourceName`.
fn pod_name(field: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    let before = errors.0.len();
    self::name(field, name, errors);
    if errors.0.len() == before && !is_pod_level(name) {
        errors.0.push(FieldError::not_supported(field.path(), name, &["cpu", "hugepages-", "memory"]));
    }
}

/// As `ValidateResourceQuotaResourceName`.
pub fn quota_name(field: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    self::name(field, name, errors);
    if !name.contains('/') && !is_standard_quota(name) {
        errors.invalid_as(field, name, "must be a standard resource for quota");
    }
}

/// As `IsStandardQuotaResourceName`.
pub fn is_standard_quota(name: &str) -> bool {
    STANDARD.contains(&name) && name != "storage"
        || name == "services.loadbalancers"
        || is_hugepages(name)
        || name.starts_with("requests.hugepages-")
}

/// As `ValidateResourceQuantityValue`.
pub fn amount(name: &str, field: &Field<'_, '_>, errors: &mut Errors) {
    let Ok(quantity) = Quantity::parse(field.str()) else { return };
    if quantity < Quantity::ZERO {
        errors.invalid(field, "must be greater than or equal to 0");
    }
    if (INTEGERS.contains(&name) || is_extended(name)) && quantity.milli_value() % 1000 != 0 {
        errors.invalid(field, "must be an integer");
    }
}

/// Names and amounts of a list.
pub fn amounts(list: &Field<'_, '_>, check: NameCheck, errors: &mut Errors) {
    for (name, field) in list.entries() {
        check(&field, name, errors);
        amount(name, &field, errors);
    }
}

/// Resources of a container. As `ValidateContainerResourceRequirements`.
pub fn of_container(resources: &Field<'_, '_>, pod_claims: &[&str], errors: &mut Errors) {
    if !resources.is_empty() {
        requirements(resources, container_name, pod_claims, errors);
    }
}

/// As `validateOverhead`.
pub fn overhead(overhead: &Field<'_, '_>, errors: &mut Errors) {
    let limits = overhead.at("limits");
    for (name, amount) in overhead.entries() {
        let field = limits.key(name).with(amount.value);
        container_name(&field, name, errors);
        self::amount(name, &field, errors);
        hugepages(name, &field, errors);
    }
}

fn requirements(resources: &Field<'_, '_>, check: NameCheck, pod_claims: &[&str], errors: &mut Errors) {
    let (limits, requests) = (resources.at("limits"), resources.at("requests"));
    amounts(&limits, check, errors);
    for (name, limit) in limits.entries() {
        hugepages(name, &limit, errors);
    }
    for (name, request) in requests.entries() {
        check(&request, name, errors);
        amount(name, &request, errors);
        let limit = limits.value.get(name).and_then(Value::as_str);
        match limit.and_then(|text| Some((text, Quantity::parse(text).ok()?))) {
            Some((text, limit)) => {
                let wanted = Quantity::parse(request.str()).unwrap_or_default();
                if wanted != limit && !overcommittable(name) {
                    errors.invalid_as(&requests, request.str(), format!("must be equal to {name} limit of {text}"));
                } else if wanted > limit {
                    let why = format!("must be less than or equal to {name} limit of {text}");
                    errors.invalid_as(&requests, request.str(), why);
                }
            }
            None if !overcommittable(name) => {
                errors.required(&limits, "Limit must be set for non overcommitable resources");
            }
            None => {}
        }
        hugepages(name, &request, errors);
    }
    let mut names = limits.entries().chain(requests.entries()).map(|(name, _)| name);
    let huge = names.any(is_hugepages);
    let basic = ["cpu", "memory"].iter().any(|name| limits.key(name).is_set() || requests.key(name).is_set());
    if huge && !basic {
        errors.forbidden(resources, "HugePages require cpu or memory");
    }
    claims(&resources.at("claims"), pod_claims, errors);
}

fn hugepages(name: &str, field: &Field<'_, '_>, errors: &mut Errors) {
    let Some(size) = name.strip_prefix("hugepages-") else { return };
    let (Ok(size), Ok(amount)) = (Quantity::parse(size), Quantity::parse(field.str())) else {
        errors.invalid(field, format!("{} is not positive integer multiple of {name}", field.str()));
        return;
    };
    let whole = size > Quantity::ZERO && size.milli_value() % 1000 == 0;
    if !whole || amount.value() % size.value() != 0 {
        errors.invalid(field, format!("{} is not positive integer multiple of {name}", field.str()));
    }
}

/// As `validateResourceClaimNames`.
fn claims(claims: &Field<'_, '_>, pod_claims: &[&str], errors: &mut Errors) {
    for (at, claim) in claims.items().enumerate() {
        let (name, request) = (claim.at("name"), claim.at("request"));
        if name.is_blank() {
            errors.required(&claim, "");
            continue;
        }
        let before = || claims.items().take(at).filter(|c| c.at("name").str() == name.str());
        let whole = before().any(|c| c.at("request").is_blank());
        if whole || (request.is_blank() && before().next().is_some()) {
            errors.0.push(FieldError::duplicate(claim.path(), name.str()));
        } else {
            errors.named(&request, is_dns1123_label);
            if before().any(|c| c.at("request").str() == request.str()) {
                errors.0.push(FieldError::duplicate(claim.path(), format!("{}/{}", name.str(), request.str())));
            }
        }
        if !pod_claims.contains(&name.str()) {
            let mut known = pod_claims.to_vec();
            known.sort_unstable();
            let list = if known.is_empty() { " which is empty".to_owned() } else { format!(": {}", known.join(", ")) };
            let mut error = FieldError::not_found(claim.path(), name.str());
            error.detail = format!("must be one of the names in pod.spec.resourceClaims{list}");
            errors.0.push(error);
        }
    }
}

// === resources of a pod as a whole ===

/// As `validatePodResources`.
pub fn of_pod(spec: &Field<'_, '_>, errors: &mut Errors) {
    let resources = spec.at("resources");
    if !resources.is_set() {
        return;
    }
    if resources.at("claims").is_set() {
        errors.forbidden(&resources.at("claims"), "claims cannot be set for Resources at pod-level");
    }
    requirements(&resources, pod_name, &[], errors);
    let (requests, limits) = (resources.at("requests"), resources.at("limits"));
    for (name, total) in container_requests(spec.value) {
        let request = requests.key(&name);
        let own = Quantity::parse(request.str()).unwrap_or_default();
        if total > own {
            let why = format!("must be greater than or equal to aggregate container requests of {total}");
            errors.invalid_as(&request, own.to_string(), why);
        }
    }
    for (at, container) in spec.at("containers").items().enumerate() {
        let own = container.at("resources");
        for (name, limit) in own.at("limits").entries() {
            let Ok(most) = Quantity::parse(limits.key(name).str()) else { continue };
            if Quantity::parse(limit.str()).is_ok_and(|limit| limit > most) {
                errors.0.push(FieldError::invalid(
                    format!("{}.containers[{at}][{name}].limits", resources.path()),
                    limit.str(),
                    format!("must be less than or equal to pod limits of {most}"),
                ));
            }
        }
    }
}

/// What the containers of a spec request together. As `AggregateContainerRequests`.
pub fn container_requests(spec: &Value) -> Vec<(String, Quantity)> {
    let mut spec = spec.clone();
    for field in ["resources", "overhead"] {
        crate::registry::object::remove(&mut spec, field);
    }
    serde_json::from_value::<PodSpec>(spec)
        .map(|spec| apimachinery::pod::requests(&spec).into_iter().collect())
        .unwrap_or_default()
}
