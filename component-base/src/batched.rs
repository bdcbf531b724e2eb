//! A socket that is read and written in fewer and larger pieces than TLS and HTTP/2 ask for: each system call costs as much as
//! a small answer.
//!
//! What is written is gathered until it is flushed, and that waits until the other tasks that can run have run: answers that are
//! ready at the same time go out together. Only who flushes what it has written may switch this on; HTTP/2 does.

use bytes::{Buf as _, BytesMut};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// So much is gathered at most.
const GATHERED_MAX: usize = 64 << 10;
/// Larger pieces are not copied.
const PIECE_MAX: usize = 8 << 10;
/// So much is read at a time.
const READ: usize = 16 << 10;

thread_local! {
    /// To read into, and to gather in: what a thread's sockets share, as long as they have no need of it at the same time.
    static READING: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static GATHERING: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// See the module. Between its uses it holds no memory: there are many connections.
#[derive(Debug)]
pub struct Batched<S> {
    socket: S,
    on: bool,
    /// What has been read and not been asked for yet.
    read: BytesMut,
    gathered: Vec<u8>,
    /// So much of what is gathered has been written.
    written: usize,
    /// A flush has waited for the other tasks.
    has_waited: bool,
}

// === impl Batched ===

impl<S> Batched<S> {
    pub fn new(socket: S) -> Self {
        Self { socket, on: false, read: BytesMut::new(), gathered: Vec::new(), written: 0, has_waited: false }
    }

    /// From now on whoever writes flushes.
    pub fn start(&mut self) {
        self.on = true;
    }
}

impl<S: AsyncWrite + Unpin> Batched<S> {
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.gathered.len() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.gathered[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                size => self.written += size,
            }
        }
        if self.written > 0 {
            let mut room = std::mem::take(&mut self.gathered);
            room.clear();
            GATHERING.set(room);
            self.written = 0;
        }
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
            self.gathered = GATHERING.take();
            self.gathered.reserve(READ);
        }
        Poll::Ready(Ok(true))
    }
}

impl<S: AsyncRead + Unpin> Batched<S> {
    /// Reads into memory that the thread's sockets share; what `buf` has no room for is kept.
    fn read_ahead(&mut self, cx: &mut Context<'_>, room: &mut Vec<u8>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        room.resize(READ, 0);
        let mut read = ReadBuf::new(room);
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
        let (now, later) = read.filled().split_at(read.filled().len().min(buf.remaining()));
        buf.put_slice(now);
        self.read.extend_from_slice(later);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Batched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            if !this.on || buf.remaining() >= READ {
                return Pin::new(&mut this.socket).poll_read(cx, buf);
            }
            let mut room = READING.take();
            let done = this.read_ahead(cx, &mut room, buf);
            READING.set(room);
            return done;
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
                // To be woken when there is nothing else to do. Who wakes itself instead has another thread come to help.
                return std::pin::pin!(tokio::task::yield_now()).poll(cx).map(Ok);
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
