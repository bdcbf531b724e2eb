//! The little of SPDY/3.1 that a client of a runtime's streaming server needs: open streams, send and receive data, half
//! close. No flow control (the servers have none) and no decompression: header blocks of answers carry nothing of interest.
//!
//! Header blocks must be zlib streams with SPDY's dictionary. Ours are stored, not compressed, so only the dictionary's
//! checksum is needed.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FLAG_FIN: u8 = 1;
/// Adler-32 of SPDY's header dictionary.
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;
/// zlib: deflate, 32 KiB window, preset dictionary.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x20];
/// The largest data frame that is sent.
const MAX_DATA: usize = 32 << 10;

/// What came from the other side.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Data { stream: u32, data: Bytes, fin: bool },
    Reset { stream: u32 },
    Ping(u32),
    GoAway,
    Other,
}

/// The sending half.
pub(super) struct Writer<W> {
    io: W,
    next_stream: u32,
    /// The header compression context has begun.
    begun: bool,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(io: W) -> Self {
        Self { io, next_stream: 1, begun: false }
    }

    /// Opens a stream with these headers; gives its ID.
    pub(super) async fn open(&mut self, headers: &[(&str, &str)]) -> std::io::Result<u32> {
        let id = self.next_stream;
        self.next_stream += 2;
        let block = header_block(headers, std::mem::replace(&mut self.begun, true));
        let mut frame = BytesMut::new();
        control(&mut frame, SYN_STREAM, 0, 10 + block.len());
        frame.put_u32(id);
        frame.put_u32(0);
        frame.put_u16(0);
        frame.put_slice(&block);
        self.io.write_all(&frame).await?;
        self.io.flush().await?;
        Ok(id)
    }

    pub(super) async fn data(&mut self, stream: u32, data: &[u8]) -> std::io::Result<()> {
        for chunk in data.chunks(MAX_DATA) {
            self.data_frame(stream, chunk, 0).await?;
        }
        self.io.flush().await
    }

    /// Nothing more will be sent on this stream.
    pub(super) async fn finish(&mut self, stream: u32) -> std::io::Result<()> {
        self.data_frame(stream, &[], FLAG_FIN).await?;
        self.io.flush().await
    }

    async fn data_frame(&mut self, stream: u32, data: &[u8], flags: u8) -> std::io::Result<()> {
        let mut frame = BytesMut::with_capacity(8 + data.len());
        frame.put_u32(stream & 0x7fff_ffff);
        frame.put_u8(flags);
        frame.put_uint(data.len() as u64, 3);
        frame.put_slice(data);
        self.io.write_all(&frame).await
    }

    /// Answers a ping.
    pub(super) async fn pong(&mut self, id: u32) -> std::io::Result<()> {
        let mut frame = BytesMut::new();
        control(&mut frame, PING, 0, 4);
        frame.put_u32(id);
        self.io.write_all(&frame).await?;
        self.io.flush().await
    }
}

fn control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u8(flags);
    out.put_uint(length as u64, 3);
}

/// Headers as a stored block of one zlib stream that spans the connection.
fn header_block(headers: &[(&str, &str)], begun: bool) -> Vec<u8> {
    let mut plain = Vec::new();
    plain.put_u32(u32::try_from(headers.len()).unwrap_or(0));
    for (name, value) in headers {
        for text in [name, value] {
            plain.put_u32(u32::try_from(text.len()).unwrap_or(0));
            plain.put_slice(text.as_bytes());
        }
    }
    let mut block = Vec::with_capacity(plain.len() + 11);
    if !begun {
        block.put_slice(&ZLIB_HEADER);
        block.put_u32(DICTIONARY_ID);
    }
    let length = u16::try_from(plain.len()).unwrap_or(u16::MAX);
    block.put_u8(0);
    block.put_u16_le(length);
    block.put_u16_le(!length);
    block.put_slice(&plain);
    // An empty block flushes: a reader hands out what it has only then.
    block.put_slice(&[0, 0, 0, 0xff, 0xff]);
    block
}

/// The receiving half.
pub(super) struct Reader<R> {
    io: R,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(io: R) -> Self {
        Self { io }
    }

    /// The next frame; None at the end. Not cancel-safe: own it in one task.
    pub(super) async fn next(&mut self) -> std::io::Result<Option<Frame>> {
        let mut head = [0; 8];
        match self.io.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut fields = &head[..];
        let first = fields.get_u32();
        let flags = fields.get_u8();
        let length = usize::try_from(fields.get_uint(3)).unwrap_or(0);
        let mut body = vec![0; length];
        self.io.read_exact(&mut body).await?;
        if first & 0x8000_0000 == 0 {
            return Ok(Some(Frame::Data { stream: first, data: Bytes::from(body), fin: flags & FLAG_FIN != 0 }));
        }
        let number = |body: &[u8]| if body.len() >= 4 { (&body[..4]).get_u32() } else { 0 };
        Ok(Some(match u16::try_from(first & 0xffff).unwrap_or(0) {
            RST_STREAM => Frame::Reset { stream: number(&body) },
            PING => Frame::Ping(number(&body)),
            GOAWAY => Frame::GoAway,
            _ => Frame::Other,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_laid_out_as_the_protocol_says() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        assert_eq!(writer.open(&[("streamtype", "error")]).await.unwrap(), 1);
        assert_eq!(writer.open(&[("streamtype", "stdin")]).await.unwrap(), 3);
        writer.data(3, b"hi").await.unwrap();
        writer.finish(3).await.unwrap();
        assert_eq!(&bytes[..4], [0x80, 3, 0, 1]);
        // The zlib header comes once; it must be divisible by 31.
        assert_eq!((u16::from(ZLIB_HEADER[0]) * 256 + u16::from(ZLIB_HEADER[1])) % 31, 0);
        assert_eq!(&bytes[18..24], [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2]);
        assert!(bytes.ends_with(&[0, 0, 0, 3, 0, 0, 0, 2, b'h', b'i', 0, 0, 0, 3, 1, 0, 0, 0]));
        let mut reader = Reader::new(&bytes[..]);
        assert_eq!(reader.next().await.unwrap(), Some(Frame::Other));
        assert_eq!(reader.next().await.unwrap(), Some(Frame::Other));
        assert_eq!(
            reader.next().await.unwrap(),
            Some(Frame::Data { stream: 3, data: Bytes::from_static(b"hi"), fin: false })
        );
        assert_eq!(reader.next().await.unwrap(), Some(Frame::Data { stream: 3, data: Bytes::new(), fin: true }));
        assert_eq!(reader.next().await.unwrap(), None);
    }
}
