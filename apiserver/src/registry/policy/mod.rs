//! policy/v1: PodDisruptionBudgets. Evictions are a subresource of pods.

pub mod pod_disruption_budget;
