//! A socket that is read and written in fewer and larger pieces than TLS and HTTP/2 ask for: each system call costs as much as
//! a small answer.
//!
//! What is written is gathered until it is flushed, and that waits until the other tasks that can run have run: answers that are
//! ready at the same time go out together. Only who flushes what it has written may switch this on; HTTP/2 does.

use bytes::{Buf as _, BytesMut};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::{poll_read_buf, poll_write_buf};

/// So much is gathered at most.
const GATHERED_MAX: usize = 64 << 10;
/// Larger pieces are not copied.
const PIECE_MAX: usize = 8 << 10;
/// So much is read at a time.
const READ: usize = 16 << 10;

/// See the module. Between its uses it holds no memory: there are many connections.
#[derive(Debug)]
pub struct Batched<S> {
    socket: S,
    on: bool,
    read: BytesMut,
    gathered: BytesMut,
    /// A flush has waited for the other tasks.
    has_waited: bool,
}

// === impl Batched ===

impl<S> Batched<S> {
    pub fn new(socket: S) -> Self {
        Self { socket, on: false, read: BytesMut::new(), gathered: BytesMut::new(), has_waited: false }
    }

    /// From now on whoever writes flushes.
    pub fn start(&mut self) {
        self.on = true;
    }
}

impl<S: AsyncWrite + Unpin> Batched<S> {
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.gathered.has_remaining() {
            if ready!(poll_write_buf(Pin::new(&mut self.socket), cx, &mut self.gathered))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Makes room for a piece of this size; gives whether it is to be gathered.
    fn gathers(&mut self, cx: &mut Context<'_>, size: usize) -> Poll<io::Result<bool>> {
        if !self.gathered.is_empty() && self.gathered.len() + size > GATHERED_MAX {
            ready!(self.drain(cx))?;
        }
        if !self.on || (self.gathered.is_empty() && size > PIECE_MAX) {
            return Poll::Ready(Ok(false));
        }
        if self.gathered.is_empty() {
            self.gathered.reserve(READ);
        }
        Poll::Ready(Ok(true))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Batched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            if !this.on || buf.remaining() >= READ {
                return Pin::new(&mut this.socket).poll_read(cx, buf);
            }
            this.read.reserve(READ);
            let read = poll_read_buf(Pin::new(&mut this.socket), cx, &mut this.read);
            if !matches!(read, Poll::Ready(Ok(1..))) {
                this.read = BytesMut::new();
            }
            ready!(read)?;
        }
        let size = this.read.len().min(buf.remaining());
        buf.put_slice(&this.read[..size]);
        this.read.advance(size);
        if this.read.is_empty() {
            this.read = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Batched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if ready!(this.gathers(cx, buf.len()))? {
            this.gathered.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut this.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let size = bufs.iter().map(|buf| buf.len()).sum();
        if ready!(this.gathers(cx, size))? {
            bufs.iter().for_each(|buf| this.gathered.extend_from_slice(buf));
            return Poll::Ready(Ok(size));
        }
        Pin::new(&mut this.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.gathered.is_empty() {
            if !std::mem::replace(&mut this.has_waited, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            ready!(this.drain(cx))?;
        }
        this.has_waited = false;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.drain(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_is_written_goes_out_when_it_is_flushed_in_its_order() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut batched = Batched::new(ours);
        batched.write_all(b"a").await.unwrap();
        let mut seen = [0; 1];
        theirs.read_exact(&mut seen).await.unwrap();
        batched.start();
        let mut sent = Vec::new();
        for (at, size) in [1, 100, PIECE_MAX, PIECE_MAX + 1, 30_000, GATHERED_MAX, 7].into_iter().enumerate() {
            let piece = vec![at as u8; size];
            batched.write_all(&piece).await.unwrap();
            sent.extend(piece);
        }
        batched.flush().await.unwrap();
        let mut received = vec![0; sent.len()];
        theirs.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
        batched.write_all(b"end").await.unwrap();
        batched.shutdown().await.unwrap();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"end");
    }

    #[tokio::test]
    async fn what_is_read_ahead_is_handed_out_piece_by_piece() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut batched = Batched::new(ours);
        batched.start();
        let sent: Vec<u8> = (0..50_000_u32).map(|n| n as u8).collect();
        theirs.write_all(&sent).await.unwrap();
        drop(theirs);
        let (mut received, mut piece) = (Vec::new(), [0; 999]);
        loop {
            match batched.read(&mut piece).await.unwrap() {
                0 => break,
                size => received.extend_from_slice(&piece[..size]),
            }
        }
        assert_eq!(received, sent);
    }
}
