//! What every Pilothouse daemon shares about running: flags, logs, the client, informers, serving, metrics, leader
//! election, events.
#![forbid(unsafe_code)]

pub mod auth;
pub mod backoff;
mod batched;
pub mod cidr;
pub mod cli;
pub mod client;
pub mod command;
pub mod daemon;
pub mod events;
pub mod informer;
pub mod leader_election;
pub mod lean;
pub mod metrics;
pub mod nftables;
pub mod serving;
pub mod streams;
pub mod tls;
pub mod x509;
