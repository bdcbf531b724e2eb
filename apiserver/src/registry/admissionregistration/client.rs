//! How a webhook is reached: by URL or by Service, for admission and for the conversion of custom resources.

use crate::registry::field::{Errors, Field};
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::status::FieldError;

const FORM: &str = "; desired format: https://host[/path]";

/// Either a URL or a Service. As `ValidateWebhookURL` and `ValidateWebhookService`.
pub fn webhook_client(config: &Field<'_, '_>, errors: &mut Errors) {
    let (at, service) = (config.at("url"), config.at("service"));
    match (at.is_set(), service.is_set()) {
        (true, false) => url(&at, errors),
        (false, true) => self::service(&service, errors),
        _ => errors.required(config, "exactly one of url or service is required"),
    }
}

fn url(field: &Field<'_, '_>, errors: &mut Errors) {
    let Ok(uri) = field.str().split('#').next().unwrap_or("").parse::<http::Uri>() else {
        errors.required(
            field,
            &format!("url must be a valid URL: parse {:?}: invalid URI for request{FORM}", field.str()),
        );
        return;
    };
    let mut refuse = |value: &str, why: &str| {
        errors.0.push(FieldError::invalid(field.path(), value, format!("{why}{FORM}")));
    };
    if uri.scheme_str() != Some("https") {
        refuse(uri.scheme_str().unwrap_or(""), "'https' is the only allowed URL scheme");
    }
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    if host.is_empty() {
        refuse("", "host must be specified");
    }
    if authority.contains('@') {
        refuse(user, "user information is not permitted in the URL");
    }
    if let Some((_, fragment)) = field.str().split_once('#').filter(|(_, fragment)| !fragment.is_empty()) {
        refuse(fragment, "fragments are not permitted in the URL");
    }
    if let Some(query) = uri.query().filter(|query| !query.is_empty()) {
        refuse(query, "query parameters are not permitted in the URL");
    }
}

fn service(service: &Field<'_, '_>, errors: &mut Errors) {
    for needed in ["name", "namespace"] {
        if service.at(needed).is_blank() {
            errors.required(&service.at(needed), &format!("service {needed} is required"));
        }
    }
    let (port, path) = (service.at("port"), service.at("path"));
    if port.int().is_some_and(|port| !(1..=65535).contains(&port)) {
        errors.invalid(&port, "port is not valid: must be between 1 and 65535, inclusive");
    }
    match path.str() {
        "" | "/" => return,
        "//" => {
            errors.invalid(&path, "segment[0] may not be empty");
            return;
        }
        text if !text.starts_with('/') => errors.invalid(&path, "must start with a '/'"),
        _ => {}
    }
    let text = path.str();
    let steps = text.get(1..).unwrap_or("");
    for (at, step) in steps.strip_suffix('/').unwrap_or(steps).split('/').enumerate() {
        if step.is_empty() {
            errors.invalid(&path, format!("segment[{at}] may not be empty"));
            continue;
        }
        for message in is_dns1123_subdomain(step) {
            errors.invalid(&path, format!("segment[{at}]: {message}"));
        }
    }
}
