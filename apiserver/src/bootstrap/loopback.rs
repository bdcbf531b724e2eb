//! The server as a client of itself: reads from the caches, writes through the endpoints that everyone's writes go through.

use crate::authentication::UserInfo;
use crate::endpoints::{ResourceRequest, create, delete, update};
use crate::registry::Resource;
use crate::registry::strategy::Part;
use crate::server::Context;
use crate::server::negotiation::Incoming;
use crate::server::request_info::RequestInfo;
use apimachinery::facts;
use apimachinery::meta::Gvk;
use apimachinery::status::StatusError;
use http::Method;
use serde_json::Value;
use std::sync::Arc;

/// See the module. Objects carry their `apiVersion`, `kind`, name and namespace.
pub struct Loopback {
    context: Arc<Context>,
    user: Arc<UserInfo>,
}

/// Where an object belongs.
struct Place<'c> {
    resource: &'c Arc<Resource>,
    namespace: String,
    name: String,
}

// === impl Loopback ===

impl Loopback {
    pub fn new(context: Arc<Context>) -> Self {
        let user = UserInfo {
            name: "system:apiserver".to_owned(),
            groups: vec!["system:masters".to_owned(), "system:authenticated".to_owned()],
            ..UserInfo::default()
        };
        Self { context, user: Arc::new(user) }
    }

    pub fn context(&self) -> &Context {
        &self.context
    }

    /// What stands where `object` belongs.
    pub async fn get(&self, object: &Value) -> Result<Option<Value>, StatusError> {
        let place = self.place(object)?;
        match self.context.store.get_cached(place.resource, &place.namespace, &place.name) {
            Ok(stored) => Ok(Some(place.resource.value(&stored))),
            Err(error) if error.code() == 404 => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates the object unless there is one.
    pub async fn ensure(&self, object: &Value) -> Result<(), StatusError> {
        if self.get(object).await?.is_some() {
            return Ok(());
        }
        let place = self.place(object)?;
        let incoming = Incoming { object: object.clone(), warnings: Vec::new() };
        let info = place.info(&Method::POST);
        match create::create(&mut self.request(&place, &info), incoming).await {
            Ok(_) => {
                tracing::info!(kind = place.resource.kind, namespace = place.namespace, name = place.name, "created");
                Ok(())
            }
            Err(error) if error.reason() == "AlreadyExists" => Ok(()),
            Err(error) => Err(self.named(error, &place)),
        }
    }

    /// Creates the object, or makes it as it is wanted where `same(current, wanted)` says that it is not.
    pub async fn keep(&self, object: &Value, same: impl Fn(&Value, &Value) -> bool) -> Result<(), StatusError> {
        match self.get(object).await? {
            None => self.ensure(object).await,
            Some(current) if same(&current, object) => Ok(()),
            Some(current) => {
                let mut wanted = object.clone();
                wanted["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"].clone();
                self.update(wanted).await
            }
        }
    }

    pub async fn update(&self, object: Value) -> Result<(), StatusError> {
        self.put(object, Part::Main).await
    }

    pub async fn update_status(&self, object: Value) -> Result<(), StatusError> {
        self.put(object, Part::Status).await
    }

    async fn put(&self, object: Value, part: Part) -> Result<(), StatusError> {
        let place = self.place(&object)?;
        let mut info = place.info(&Method::PUT);
        if part == Part::Status {
            info.subresource = "status".to_owned();
        }
        let incoming = || Ok(Incoming { object: object.clone(), warnings: Vec::new() });
        let mut request = ResourceRequest { part, ..self.request(&place, &info) };
        match update::update(&mut request, incoming()?, &incoming).await {
            Ok(_) => {
                tracing::info!(kind = place.resource.kind, namespace = place.namespace, name = place.name, "updated");
                Ok(())
            }
            Err(error) => Err(self.named(error, &place)),
        }
    }

    /// All objects of a kind, as they are now.
    pub async fn all(&self, group: &str, kind: &str) -> Result<Vec<Value>, StatusError> {
        let kind = facts::kinds().iter().find(|f| f.group == group && f.kind == kind && f.is_stored());
        let resource = kind.and_then(|kind| self.context.registry.get(kind.group, kind.version, kind.resource));
        let resource = resource.ok_or_else(StatusError::no_such_resource)?;
        let store = &self.context.store;
        store.wait_for(None).await?;
        let objects = store.cache(resource)?.list("");
        Ok(objects.iter().map(|stored| resource.value(stored)).collect())
    }

    pub async fn delete(&self, object: &Value) -> Result<(), StatusError> {
        let place = self.place(object)?;
        let info = place.info(&Method::DELETE);
        match delete::delete(&self.request(&place, &info), &delete::options(&[], &info.query)?).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == 404 => Ok(()),
            Err(error) => Err(self.named(error, &place)),
        }
    }

    fn place(&self, object: &Value) -> Result<Place<'_>, StatusError> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let gvk = Gvk::from_api_version(text("/apiVersion"), text("/kind"));
        let kinds = facts::kinds().iter();
        let kind = kinds.into_iter().find(|f| f.group == gvk.group && f.version == gvk.version && f.kind == gvk.kind);
        let resource = kind.and_then(|kind| self.context.registry.get(kind.group, kind.version, kind.resource));
        let resource = resource.ok_or_else(StatusError::no_such_resource)?;
        Ok(Place {
            resource,
            namespace: text("/metadata/namespace").to_owned(),
            name: text("/metadata/name").to_owned(),
        })
    }

    fn request<'a>(&'a self, place: &Place<'a>, info: &'a RequestInfo) -> ResourceRequest<'a> {
        ResourceRequest {
            context: &self.context,
            info,
            attributes: info.attributes(self.user.clone()),
            resource: place.resource,
            part: Part::Main,
            dry_run: false,
        }
    }

    fn named(&self, mut error: StatusError, place: &Place<'_>) -> StatusError {
        let what = format!("{} {}/{}", place.resource.kind, place.namespace, place.name);
        error.0.message = Some(format!("{what}: {}", error.message()));
        error
    }
}

// === impl Place ===

impl Place<'_> {
    /// The request that would address it.
    fn info(&self, method: &Method) -> RequestInfo {
        let gvr = &self.resource.gvr;
        let base = if gvr.group.is_empty() { "/api".to_owned() } else { format!("/apis/{}", gvr.group) };
        let namespace =
            if self.resource.namespaced { format!("/namespaces/{}", self.namespace) } else { String::new() };
        let name = if method == Method::POST { String::new() } else { format!("/{}", self.name) };
        RequestInfo::parse(method, &format!("{base}/{}{namespace}/{}{name}", gvr.version, gvr.resource), "")
    }
}
