//! CEL selectors of devices: `device.driver`, `device.attributes[DOMAIN].NAME`, `device.capacity[DOMAIN].NAME`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::resource::v1::{Device, DeviceAttribute, DeviceSelector};
use kube_cel::KubeCelExt;
use kube_cel::cel::{Context, Program, Value};
use parking_lot::Mutex;

/// Expressions that are kept compiled.
const PROGRAMS_MAX: usize = 1024;

/// Evaluates selectors; expressions are compiled once.
#[derive(Default)]
pub struct Selectors {
    programs: Mutex<HashMap<String, Arc<Result<Program, String>>>>,
}

impl fmt::Debug for Selectors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Selectors").finish_non_exhaustive()
    }
}

impl Selectors {
    /// Whether a device is what all selectors want. An expression that fails on a device does not select it.
    pub fn select(&self, selectors: &[DeviceSelector], driver: &str, device: &Device) -> bool {
        if selectors.is_empty() {
            return true;
        }
        let mut context = Context::default().with_all();
        let value = self.device(driver, device);
        context.add_variable_from_value("device", value);
        selectors.iter().all(|selector| {
            let Some(cel) = &selector.cel else { return false };
            match &*self.program(&cel.expression) {
                Ok(program) => matches!(program.execute(&context), Ok(Value::Bool(true))),
                Err(_) => false,
            }
        })
    }

    /// Why an expression cannot be used.
    pub fn check(&self, selectors: &[DeviceSelector]) -> Result<(), String> {
        selectors.iter().filter_map(|selector| selector.cel.as_ref()).try_for_each(|cel| {
            match &*self.program(&cel.expression) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("CEL compile error: {error}")),
            }
        })
    }

    fn program(&self, expression: &str) -> Arc<Result<Program, String>> {
        let mut programs = self.programs.lock();
        if let Some(program) = programs.get(expression) {
            return program.clone();
        }
        if programs.len() >= PROGRAMS_MAX {
            programs.clear();
        }
        let program = Arc::new(Program::compile(expression).map_err(|error| error.to_string()));
        programs.insert(expression.to_owned(), program.clone());
        program
    }

    /// As `device` is declared in Kubernetes' environment.
    fn device(&self, driver: &str, device: &Device) -> Value {
        let attributes = device.attributes.iter().flatten();
        let attributes = attributes.filter_map(|(name, value)| Some((name.as_str(), self.attribute(value)?)));
        let capacity = device.capacity.iter().flatten();
        let capacity =
            capacity.filter_map(|(name, value)| Some((name.as_str(), self.call("quantity(text)", &value.value.0)?)));
        let shared = device.allow_multiple_allocations.unwrap_or(false);
        map([
            ("driver", Value::String(Arc::new(driver.to_owned()))),
            ("attributes", by_domain(driver, attributes)),
            ("capacity", by_domain(driver, capacity)),
            ("allowMultipleAllocations", Value::Bool(shared)),
        ])
    }

    fn attribute(&self, attribute: &DeviceAttribute) -> Option<Value> {
        let text = |text: &String| Value::String(Arc::new(text.clone()));
        let list = |values: Vec<Value>| Value::List(Arc::new(values));
        if let Some(value) = attribute.bool {
            return Some(Value::Bool(value));
        }
        if let Some(value) = attribute.int {
            return Some(Value::Int(value));
        }
        if let Some(value) = &attribute.string {
            return Some(text(value));
        }
        if let Some(version) = &attribute.version {
            return self.call("semver(text)", version);
        }
        if let Some(values) = &attribute.bools {
            return Some(list(values.iter().map(|value| Value::Bool(*value)).collect()));
        }
        if let Some(values) = &attribute.ints {
            return Some(list(values.iter().map(|value| Value::Int(*value)).collect()));
        }
        attribute.strings.as_ref().map(|values| list(values.iter().map(text).collect()))
    }

    /// The value that a CEL function makes of a text.
    fn call(&self, expression: &str, text: &str) -> Option<Value> {
        let mut context = Context::default().with_all();
        context.add_variable_from_value("text", text.to_owned());
        match &*self.program(expression) {
            Ok(program) => program.execute(&context).ok(),
            Err(_) => None,
        }
    }
}

fn map<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let entries: HashMap<String, Value> = entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Value::from(entries)
}

/// A name without a domain belongs to the driver's.
fn by_domain<'a>(driver: &'a str, values: impl Iterator<Item = (&'a str, Value)>) -> Value {
    let mut domains: BTreeMap<&str, Vec<(&str, Value)>> = BTreeMap::new();
    domains.entry(driver).or_default();
    for (name, value) in values {
        let (domain, id) = name.split_once('/').unwrap_or((driver, name));
        domains.entry(domain).or_default().push((id, value));
    }
    map(domains.into_iter().map(|(domain, values)| (domain, map(values))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_read_attributes_and_capacity() {
        let device: Device = serde_json::from_value(json!({
            "name": "gpu-0",
            "attributes": {"model": {"string": "a100"}, "index": {"int": 3}, "other.io/ready": {"bool": true},
                "version": {"version": "1.2.3"}},
            "capacity": {"memory": {"value": "40Gi"}}
        }))
        .expect("a device");
        let selectors = Selectors::default();
        for (expression, expected) in [
            ("device.driver == 'gpu.io'", true),
            ("device.driver == 'other.io'", false),
            ("device.attributes['gpu.io'].model == 'a100'", true),
            ("device.attributes['gpu.io'].index > 2", true),
            ("device.attributes['other.io'].ready", true),
            ("device.attributes['gpu.io'].absent == 1", false),
            ("device.capacity['gpu.io'].memory.compareTo(quantity('30Gi')) > 0", true),
            ("device.capacity['gpu.io'].memory.isGreaterThan(quantity('50Gi'))", false),
            ("device.attributes['gpu.io'].version.isGreaterThan(semver('1.0.0'))", true),
            ("'gpu.io' in device.attributes && 'model' in device.attributes['gpu.io']", true),
            ("device.attributes['gpu.io'].model", false),
            ("not an expression", false),
        ] {
            let selector = [serde_json::from_value(json!({"cel": {"expression": expression}})).expect("a selector")];
            assert_eq!(selectors.select(&selector, "gpu.io", &device), expected, "{expression}");
        }
    }
}
