//! The body of a response: bytes known in full, or a stream fed through a bounded channel.

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// What handlers answer with.
pub enum Body {
    Empty,
    Full(Bytes),
    /// Several parts, sent one after another; the length is known.
    Parts {
        parts: VecDeque<Bytes>,
        length: u64,
    },
    /// Ends when the sender is dropped.
    Channel(mpsc::Receiver<Bytes>),
    /// Anything else: a proxied response.
    Boxed(Pin<Box<dyn http_body::Body<Data = Bytes, Error = BoxError> + Send + Sync>>),
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

// === impl Body ===

impl Body {
    pub fn parts(parts: Vec<Bytes>) -> Self {
        let length = parts.iter().map(|p| p.len() as u64).sum();
        Self::Parts { parts: parts.into(), length }
    }

    /// A body that is sent as the sender is fed; holds at most `capacity` frames back.
    pub fn channel(capacity: usize) -> (mpsc::Sender<Bytes>, Self) {
        let (sender, receiver) = mpsc::channel(capacity);
        (sender, Self::Channel(receiver))
    }

    pub fn boxed(body: impl http_body::Body<Data = Bytes, Error = BoxError> + Send + Sync + 'static) -> Self {
        Self::Boxed(Box::pin(body))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Full(bytes)
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self::Full(text.into())
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Self::Full(Bytes::from_static(text.as_bytes()))
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Full(bytes.into())
    }
}

impl From<Infallible> for Body {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Full(_) => match std::mem::replace(this, Self::Empty) {
                Self::Full(bytes) if !bytes.is_empty() => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                _ => Poll::Ready(None),
            },
            Self::Parts { parts, length } => match parts.pop_front() {
                Some(part) => {
                    *length -= part.len() as u64;
                    Poll::Ready(Some(Ok(Frame::data(part))))
                }
                None => Poll::Ready(None),
            },
            Self::Channel(receiver) => receiver.poll_recv(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b)))),
            Self::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Parts { parts, .. } => parts.is_empty(),
            Self::Channel(_) => false,
            Self::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Parts { length, .. } => SizeHint::with_exact(*length),
            Self::Channel(_) => SizeHint::default(),
            Self::Boxed(body) => body.size_hint(),
        }
    }
}
