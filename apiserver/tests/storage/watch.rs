//! A watch, event by event.

use crate::common::Server;
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use http::Request;
use serde_json::Value;
use std::pin::Pin;
use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Watch(futures::io::Lines<Pin<Box<dyn futures::AsyncBufRead + Send>>>);

impl Watch {
    /// `query` begins behind `watch=true&`.
    pub async fn open(server: &Server, path: &str, query: &str) -> Self {
        Self::try_open(&server.client, path, query).await.unwrap()
    }

    pub async fn try_open(client: &kube::Client, path: &str, query: &str) -> Result<Self, kube::Error> {
        let request = Request::get(format!("{path}?watch=true&{query}")).body(Vec::new()).unwrap();
        let stream: Pin<Box<dyn futures::AsyncBufRead + Send>> = Box::pin(client.request_stream(request).await?);
        Ok(Self(stream.lines()))
    }

    /// Type and object; None when the watch has ended, or broken.
    pub async fn next(&mut self) -> Option<(String, Value)> {
        let line = tokio::time::timeout(PATIENCE, self.0.try_next()).await.expect("an event in time").ok()??;
        let mut event: Value = serde_json::from_str(&line).ok()?;
        Some((event["type"].as_str()?.to_owned(), event["object"].take()))
    }

    /// `ADDED a`, with the name of the object.
    pub async fn told(&mut self) -> String {
        match self.next().await {
            Some((kind, object)) => format!("{kind} {}", object["metadata"]["name"].as_str().unwrap_or("")),
            None => "the end".to_owned(),
        }
    }
}
