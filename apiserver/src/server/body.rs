//! The body of a response: bytes known in full, or a stream that makes them as they are read.

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};

/// What handlers answer with.
pub enum Body {
    Empty,
    Full(Bytes),
    /// Anything else: lists, watches, proxied responses.
    Boxed(Pin<Box<dyn http_body::Body<Data = Pieces, Error = BoxError> + Send + Sync>>),
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What is sent together: pieces that may be shared with thousands of other responses are not copied.
#[derive(Debug, Default)]
pub struct Pieces {
    first: Bytes,
    more: VecDeque<Bytes>,
    remaining: usize,
}

// === impl Body ===

impl Body {
    /// Keeps `guard` until the body has been sent or given up.
    pub fn holding<T: Send + Sync + Unpin + 'static>(self, guard: T) -> Self {
        Self::boxed(Holding { body: self, _guard: guard })
    }

    pub fn boxed<B>(body: B) -> Self
    where
        B: http_body::Body<Data: Into<Pieces>, Error = BoxError> + Send + Sync + 'static,
    {
        Self::Boxed(Box::pin(InPieces(Box::pin(body))))
    }
}

/// A body of whatever becomes pieces.
struct InPieces<B>(Pin<Box<B>>);

impl<B: http_body::Body<Data: Into<Pieces>, Error = BoxError>> http_body::Body for InPieces<B> {
    type Data = Pieces;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Pieces>, BoxError>>> {
        let frame = self.get_mut().0.as_mut().poll_frame(cx);
        frame.map(|frame| frame.map(|frame| frame.map(|frame| frame.map_data(Into::into))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// A body with something that lives as long as it does.
struct Holding<T> {
    body: Body,
    _guard: T,
}

impl<T: Send + Sync + Unpin + 'static> http_body::Body for Holding<T> {
    type Data = Pieces;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Pieces>, BoxError>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl Pieces ===

impl Pieces {
    pub fn push(&mut self, piece: Bytes) {
        self.remaining += piece.len();
        if self.first.is_empty() {
            self.first = piece;
        } else if !piece.is_empty() {
            self.more.push_back(piece);
        }
    }
}

impl From<Bytes> for Pieces {
    fn from(bytes: Bytes) -> Self {
        Self { remaining: bytes.len(), first: bytes, more: VecDeque::new() }
    }
}

/// No piece but the first is empty, nor is that one while there are others.
impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        &self.first
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        if self.remaining == 0 {
            return 0;
        }
        let pieces = std::iter::once(&self.first).chain(&self.more);
        slices.iter_mut().zip(pieces).map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.remaining, "{count} of {}", self.remaining);
        self.remaining -= count;
        while count >= self.first.len() {
            count -= self.first.len();
            match self.more.pop_front() {
                Some(next) => self.first = next,
                None => {
                    self.first = Bytes::new();
                    return;
                }
            }
        }
        self.first.advance(count);
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
    type Data = Pieces;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Pieces>, BoxError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Full(_) => match std::mem::replace(this, Self::Empty) {
                Self::Full(bytes) if !bytes.is_empty() => Poll::Ready(Some(Ok(Frame::data(bytes.into())))),
                _ => Poll::Ready(None),
            },
            Self::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Boxed(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_as_one() {
        let texts = ["", "one", "", "two", "three", ""];
        for step in 1..12 {
            let mut pieces = Pieces::default();
            texts.iter().for_each(|text| pieces.push(Bytes::from_static(text.as_bytes())));
            let mut seen: Vec<u8> = Vec::new();
            while pieces.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 2];
                let count = pieces.chunks_vectored(&mut slices);
                let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                let size = step.min(all.len());
                seen.extend(&all[..size]);
                pieces.advance(size);
                assert_eq!(pieces.remaining(), 11 - seen.len());
            }
            assert_eq!(seen, b"onetwothree", "{step}");
        }
    }
}
