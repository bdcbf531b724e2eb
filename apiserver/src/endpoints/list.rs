//! GET of a collection: which state to serve, and what of it is selected.

use super::{Outcome, Payload, ResourceRequest, get, list_body, table};
use crate::server::negotiation::Wanted;
use crate::server::request_info::Query;
use crate::storage::cache::{Snapshot, from_key};
use crate::storage::{Page, StoredObject};
use apimachinery::continuation::Token;
use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::status::{FieldError, StatusError};
use serde_json::json;
use std::sync::Arc;

/// What a list consists of.
pub struct Selected {
    pub objects: Vec<Arc<StoredObject>>,
    pub revision: i64,
    /// Continues behind the last object; empty at the end.
    pub continue_token: String,
    pub remaining: Option<i64>,
}

/// The selectors of a request.
pub struct Selectors {
    pub labels: Selector,
    pub fields: FieldSelector,
}

/// The page of a list that is asked for.
struct Asked {
    source: Source,
    /// The key to begin at, with its namespace.
    start: String,
    /// 0 for all.
    limit: usize,
}

/// Where a list is read.
enum Source {
    /// A state; with the keys that alone can be selected, if they are few.
    Cache(Snapshot, Option<Vec<Arc<str>>>),
    /// As of a revision that is older than what the cache remembers.
    Etcd(i64),
}

pub const MATCH: &str = "resourceVersionMatch";
pub const KNOWN_MATCHES: [&str; 3] = ["Exact", "NotOlderThan", ""];
const INCONSISTENT_CONTINUE: &str = "The provided continue parameter is too old to display a consistent list result. You can \
     start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of \
     the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or \
     deleted between the time the first chunk was returned and now may show up in the list.";

// === impl Selectors ===

impl Selectors {
    pub fn of(request: &ResourceRequest<'_>) -> Result<Self, StatusError> {
        let query = &request.info.query;
        let labels = Selector::parse(query.get("labelSelector"))
            .map_err(|error| StatusError::bad_request(format!("unable to parse requirement: {error}")))?;
        let fields = FieldSelector::parse(query.get("fieldSelector"))
            .map_err(|error| StatusError::bad_request(format!("unable to parse field selector: {error}")))?;
        let known = request.resource.strategy.selectable_field_names();
        for requirement in fields.requirements() {
            let field = requirement.field.as_str();
            if !matches!(field, "metadata.name" | "metadata.namespace") && !known.contains(&field) {
                return Err(StatusError::bad_request(if known.is_empty() {
                    format!("{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")
                } else {
                    format!("field label not supported: {field}")
                }));
            }
        }
        Ok(Self { labels, fields })
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub fn match_object(&self, object: &StoredObject) -> bool {
        object.identity.matches(&self.labels, &self.fields)
    }
}

/// Lists as the client wants it.
pub async fn list(
    request: &ResourceRequest<'_>,
    wanted: Wanted,
    include: table::Include,
) -> Result<Outcome, StatusError> {
    let selected = select(request).await?;
    render(request, selected, wanted, include)
}

/// What has been selected, as the client wants it.
pub fn render(
    request: &ResourceRequest<'_>,
    selected: Selected,
    wanted: Wanted,
    include: table::Include,
) -> Result<Outcome, StatusError> {
    let resource = request.resource;
    let mut metadata = json!({"resourceVersion": selected.revision.to_string()});
    if !selected.continue_token.is_empty() {
        metadata["continue"] = selected.continue_token.as_str().into();
        if let Some(remaining) = selected.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
    }
    let response = list_body::response(resource, selected.objects, metadata, wanted, include)?;
    Ok(Outcome { code: 200, payload: Payload::Response(response), warnings: Vec::new() })
}

/// Finds what a request lists: the state it asks for, its selectors, its page.
pub async fn select(request: &ResourceRequest<'_>) -> Result<Selected, StatusError> {
    let query = &request.info.query;
    check_options(query)?;
    let selectors = Selectors::of(request)?;
    let number = |name: &str| match query.get(name) {
        "" => Ok(0),
        text => text
            .parse::<i64>()
            .map_err(|_| StatusError::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax"))),
    };
    number("timeoutSeconds")?;
    let limit = number("limit")?;
    let Asked { source, start, limit } = ask(request, &selectors.labels, limit.max(0) as usize).await?;
    let namespace = request.namespace();
    let (page, revision) = match source {
        Source::Cache(snapshot, few) => {
            let single = selectors
                .fields
                .required_value("metadata.name")
                .filter(|_| start.is_empty() && (!namespace.is_empty() || !request.resource.namespaced));
            let page = match single {
                // One object by name needs no walk through all.
                Some(name) => {
                    let key = crate::storage::keys::object_key(namespace, name);
                    let found = snapshot.objects.get(key.as_str()).filter(|o| selectors.match_object(o));
                    Page { objects: found.cloned().into_iter().collect(), last_key: None, behind: 0 }
                }
                None => match few {
                    Some(keys) => {
                        let in_range = |key: &str| *key >= *start && below(namespace, key).is_some();
                        let found = keys.iter().filter(|key| in_range(key));
                        let found = found.filter_map(|key| Some((key, snapshot.objects.get(key)?)));
                        page_of(found, limit, &selectors)
                    }
                    None => page_of(from_key(&snapshot.objects, namespace, &start), limit, &selectors),
                },
            };
            (page, snapshot.revision)
        }
        Source::Etcd(revision) => {
            let matches = |object: &StoredObject| selectors.match_object(object);
            let (store, resource) = (&request.context.store, request.resource);
            let page = store.page_at(resource, revision, namespace, &start, limit, matches).await;
            (page.map_err(|error| expired(error, request, &start))?, revision)
        }
    };
    let continue_token = match &page.last_key {
        Some(key) => Token::encode(revision, &format!("{}\0", below(namespace, key).unwrap_or(key))),
        None => String::new(),
    };
    // How many of those behind are selected nobody knows.
    let remaining = (page.last_key.is_some() && selectors.is_empty()).then_some(page.behind);
    Ok(Selected { objects: page.objects, revision, continue_token, remaining })
}

/// A page of objects in order.
fn page_of<'o>(
    mut all: impl Iterator<Item = (&'o Arc<str>, &'o Arc<StoredObject>)>,
    limit: usize,
    selectors: &Selectors,
) -> Page {
    let mut page = Page { objects: Vec::new(), last_key: None, behind: 0 };
    let mut last_key: Option<&Arc<str>> = None;
    for (key, object) in all.by_ref() {
        if !selectors.match_object(object) {
            continue;
        }
        if limit > 0 && page.objects.len() == limit {
            page.last_key = last_key.map(ToString::to_string);
            page.behind = if selectors.is_empty() { 1 + all.count() as i64 } else { 0 };
            return page;
        }
        page.objects.push(object.clone());
        last_key = Some(key);
    }
    page
}

/// A key below that of a namespace (all, if empty).
fn below<'k>(namespace: &str, key: &'k str) -> Option<&'k str> {
    if namespace.is_empty() { Some(key) } else { key.strip_prefix(namespace)?.strip_prefix('/') }
}

/// Which options go together. As `ValidateListOptions`.
fn check_options(query: &Query) -> Result<(), StatusError> {
    let mut errors = Vec::new();
    let mut forbid = |field: &str, why: &str| errors.push(FieldError::forbidden(field, why));
    let version_match = query.get("resourceVersionMatch");
    if !version_match.is_empty() {
        if query.get("resourceVersion").is_empty() {
            forbid(MATCH, "resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if !query.get("continue").is_empty() {
            forbid(MATCH, "resourceVersionMatch is forbidden when continue is provided");
        }
        if version_match == "Exact" && query.get("resourceVersion") == "0" {
            forbid(MATCH, "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
    }
    if query.has("sendInitialEvents") {
        forbid("sendInitialEvents", "sendInitialEvents is forbidden for list");
    }
    if !KNOWN_MATCHES.contains(&version_match) {
        errors.push(FieldError::not_supported(MATCH, version_match, &KNOWN_MATCHES));
    }
    if errors.is_empty() { Ok(()) } else { Err(invalid_options(&errors)) }
}

/// What is wrong with the options of a list or watch.
pub fn invalid_options(errors: &[FieldError]) -> StatusError {
    StatusError::invalid("meta.k8s.io", "ListOptions", "", errors)
}

/// The state that is asked for, the key to begin at, and the limit that holds.
async fn ask(request: &ResourceRequest<'_>, labels: &Selector, limit: usize) -> Result<Asked, StatusError> {
    let (store, resource, query) = (&request.context.store, request.resource, &request.info.query);
    let (version, version_match) = (query.get("resourceVersion"), query.get("resourceVersionMatch"));
    let cache = store.cache(resource)?;
    let newest = |reached: i64| {
        let (mut snapshot, few) = cache.snapshot_for(labels);
        snapshot.revision = snapshot.revision.max(reached);
        Source::Cache(snapshot, few)
    };
    let continued = query.get("continue");
    if !continued.is_empty() {
        let token = Token::decode(continued)?;
        if !version.is_empty() && version != "0" {
            return Err(StatusError::bad_request("specifying resource version is not allowed when using continue"));
        }
        let start = token.start.trim_start_matches('/');
        let start = crate::storage::keys::object_key(request.namespace(), start);
        let source = if token.rv < 0 {
            newest(store.wait_for(None).await?)
        } else {
            at(request, token.rv).await.map_err(|error| expired(error, request, &start))?
        };
        return Ok(Asked { source, start, limit });
    }
    let first = |source, limit| Ok(Asked { source, start: String::new(), limit });
    match version {
        "" => first(newest(store.wait_for(None).await?), limit),
        // Any state will do; as kube-apiserver's cache, the whole of it.
        "0" => first(newest(store.progress()), 0),
        text => {
            let revision = get::parse_version(text)?;
            if version_match == "Exact" || (version_match.is_empty() && limit > 0) {
                return first(at(request, revision).await?, limit);
            }
            first(newest(store.wait_for(Some(revision)).await?), limit)
        }
    }
}

/// The state at a revision.
async fn at(request: &ResourceRequest<'_>, revision: i64) -> Result<Source, StatusError> {
    let found = request.context.store.snapshot_at(request.resource, revision).await?;
    Ok(found.map_or(Source::Etcd(revision), |snapshot| Source::Cache(snapshot, None)))
}

/// A continued list whose state is gone: who does not mind an inconsistent list may go on with another token.
fn expired(error: StatusError, request: &ResourceRequest<'_>, start: &str) -> StatusError {
    if error.code() != 410 || start.is_empty() {
        return error;
    }
    let mut error = StatusError::expired(INCONSISTENT_CONTINUE);
    error.0.metadata.continue_ = Some(Token::encode(-1, below(request.namespace(), start).unwrap_or(start)));
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_do_not_go_together_are_refused() {
        for (query, ok) in [
            ("", true),
            ("resourceVersion=5&resourceVersionMatch=Exact", true),
            ("resourceVersion=0&resourceVersionMatch=NotOlderThan", true),
            ("resourceVersionMatch=Exact", false),
            ("resourceVersion=0&resourceVersionMatch=Exact", false),
            ("resourceVersion=5&resourceVersionMatch=Older", false),
            ("resourceVersion=5&resourceVersionMatch=Exact&continue=x", false),
            ("sendInitialEvents=true", false),
        ] {
            let result = check_options(&Query::parse(query)).map_err(|error| error.code());
            assert_eq!(result, if ok { Ok(()) } else { Err(422) }, "{query}");
        }
    }
}
