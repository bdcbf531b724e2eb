//! Container logs over HTTP: the runtime's log files (`<time> <stream> <tag> <content>`) as lines, from a tail or a time on,
//! and as they come.

use std::future::Future;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use apimachinery::status::StatusError;
use bytes::Bytes;
use component_base::serving::{self, BoxError, Response};
use futures::StreamExt as _;
use http::{HeaderValue, StatusCode, header};
use http_body::Frame;
use http_body_util::StreamBody;
use jiff::Timestamp;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, SeekFrom};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::ReaderStream;
use tracing::debug;

use super::{query_flag, query_one};

const BLOCK: usize = 64 << 10;
/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(100);
/// How many polls without news pass before the container is asked after.
const POLLS_A_CHECK: u32 = 5;
/// Blocks that wait for a slow reader.
const QUEUE: usize = 16;
/// The longest line that is put together from the runtime's parts.
const MAX_LINE: usize = 1 << 20;

/// What part of a log is wanted, and how. As `PodLogOptions`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Options {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub tail: Option<u64>,
    pub since: Option<Timestamp>,
    pub limit: Option<u64>,
    /// `stdout` or `stderr`; None: both.
    pub stream: Option<&'static str>,
}

impl Options {
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let number = |name: &str| -> Result<Option<u64>, String> {
            let Some(text) = query_one(query, name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| format!("{name}: {text:?} is not a number of 0 or more"))
        };
        let since = match (number("sinceSeconds")?, query_one(query, "sinceTime")) {
            (Some(seconds), _) => {
                let back = i64::try_from(seconds).unwrap_or(i64::MAX);
                Timestamp::from_second(Timestamp::now().as_second().saturating_sub(back)).ok()
            }
            (None, Some(text)) => {
                Some(text.parse().map_err(|_| format!("sinceTime: {text:?} is not an RFC 3339 time"))?)
            }
            (None, None) => None,
        };
        Ok(Self {
            follow: query_flag(query, "follow"),
            previous: query_flag(query, "previous"),
            timestamps: query_flag(query, "timestamps"),
            tail: number("tailLines")?,
            since,
            limit: number("limitBytes")?,
            stream: match query_one(query, "stream").as_deref() {
                Some("Stdout") => Some("stdout"),
                Some("Stderr") => Some("stderr"),
                _ => None,
            },
        })
    }
}

/// A response that streams the log. `is_running` tells whether a followed log may still grow.
pub(super) fn respond<F, Fut>(path: PathBuf, options: Options, is_running: F) -> Response
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = bool> + Send,
{
    let (sender, receiver) = mpsc::channel::<Bytes>(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = send(&path, &options, is_running, &sender).await {
            debug!(log = %path.display(), %error, "log not read to its end");
        }
    });
    let frames = ReceiverStream::new(receiver).map(|block| Ok::<_, BoxError>(Frame::data(block)));
    let mut response = http::Response::new(http_body_util::BodyExt::boxed(StreamBody::new(frames)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// A file of the host's logs, or what is in a directory of them. As Go's `http.FileServer`.
pub(super) async fn system(base: &Path, below: &[&str]) -> Result<Response, StatusError> {
    let missing = || StatusError::not_found("", "logs", &below.join("/"));
    if below.contains(&"..") {
        return Err(missing());
    }
    let path = below.iter().fold(base.to_owned(), |path, part| path.join(part));
    let meta = tokio::fs::metadata(&path).await.map_err(|_| missing())?;
    if meta.is_file() {
        let file = File::open(&path).await.map_err(|_| missing())?;
        // What is written meanwhile is not waited for.
        let blocks = ReaderStream::with_capacity(file.take(meta.len()), BLOCK);
        let frames = blocks.map(|block| block.map(Frame::data).map_err(BoxError::from));
        let mut response = http::Response::new(http_body_util::BodyExt::boxed(StreamBody::new(frames)));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        return Ok(response);
    }
    let mut names = Vec::new();
    let mut entries = tokio::fs::read_dir(&path).await.map_err(|_| missing())?;
    while let Ok(Some(entry)) = entries.next_entry().await {
        let slash = if entry.file_type().await.is_ok_and(|kind| kind.is_dir()) { "/" } else { "" };
        names.push(format!("{}{slash}", entry.file_name().to_string_lossy()));
    }
    names.sort();
    let plain = |name: &str| name.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&#34;");
    let line = |name: &String| format!("<a href=\"{0}\">{0}</a>\n", plain(name));
    let page = format!("<!doctype html>\n<pre>\n{}</pre>\n", names.iter().map(line).collect::<String>());
    Ok(serving::respond(StatusCode::OK, "text/html; charset=utf-8", page))
}

async fn send<F, Fut>(path: &Path, options: &Options, is_running: F, out: &mpsc::Sender<Bytes>) -> std::io::Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = bool>,
{
    let mut file = File::open(path).await?;
    if let Some(lines) = options.tail {
        let from = tail_offset(&mut file, lines).await?;
        file.seek(SeekFrom::Start(from)).await?;
    }
    let mut lines = Lines::new(options.clone());
    let mut block = vec![0; BLOCK];
    let mut idle = 0;
    let mut ended = false;
    loop {
        let count = file.read(&mut block).await?;
        if count > 0 {
            idle = 0;
            let text = lines.take(&block[..count]);
            if !text.is_empty() && out.send(text).await.is_err() {
                return Ok(());
            }
            if lines.is_full() {
                return Ok(());
            }
            continue;
        }
        if !options.follow {
            return Ok(());
        }
        // A rotated log goes on in a new file of the same name.
        let opened = file.metadata().await?.ino();
        if let Ok(now) = tokio::fs::metadata(path).await
            && now.ino() != opened
        {
            file = File::open(path).await?;
            continue;
        }
        if ended {
            return Ok(());
        }
        idle += 1;
        if idle % POLLS_A_CHECK == 0 {
            // Read once more after the end: what it wrote last may have come since.
            ended = !is_running().await;
        }
        tokio::select! {
            // The reader went away.
            () = out.closed() => return Ok(()),
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Where the last `lines` whole lines begin. The runtime's partial lines count as what they are part of.
async fn tail_offset(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let length = file.metadata().await?.len();
    if lines == 0 {
        return Ok(length);
    }
    let mut end = length;
    let mut found = 0;
    let mut carry: Vec<u8> = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        let size = usize::try_from(end - start).unwrap_or(BLOCK);
        let mut block = vec![0; size];
        file.seek(SeekFrom::Start(start)).await?;
        file.read_exact(&mut block).await?;
        block.extend_from_slice(&carry);
        // Every line that begins in this block, from the last to the first.
        let mut line_end = block.len();
        for at in (0..size).rev() {
            let begins = at == 0 && start == 0 || at > 0 && block[at - 1] == b'\n';
            if !begins {
                continue;
            }
            let line = &block[at..line_end];
            line_end = at;
            if line.is_empty() {
                continue;
            }
            // A full line ends a group; partial ones before it belong to it.
            if parse(line).is_some_and(|l| !l.partial) {
                found += 1;
                if found > lines {
                    return Ok(start + at as u64 + line.len() as u64);
                }
            }
        }
        carry = block[..line_end].to_vec();
        if carry.len() > MAX_LINE {
            carry.clear();
        }
        end = start;
    }
    Ok(0)
}

/// One line of the runtime's.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    time: &'a [u8],
    stream: &'a [u8],
    partial: bool,
    content: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Line { time, stream, partial: tag.first() == Some(&b'P'), content: parts.next().unwrap_or_default() })
}

/// Turns blocks of the file into what is sent.
struct Lines {
    options: Options,
    rest: Vec<u8>,
    /// The last line went out without its end.
    open: bool,
    sent: u64,
}

impl Lines {
    fn new(options: Options) -> Self {
        Self { options, rest: Vec::new(), open: false, sent: 0 }
    }

    fn is_full(&self) -> bool {
        self.options.limit.is_some_and(|limit| self.sent >= limit)
    }

    fn take(&mut self, block: &[u8]) -> Bytes {
        self.rest.extend_from_slice(block);
        let mut out = Vec::with_capacity(self.rest.len());
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].iter().position(|b| *b == b'\n') {
            let end = begin + length + 1;
            self.open = write(&mut out, &self.rest[begin..end], &self.options, self.open);
            begin = end;
        }
        self.rest.drain(..begin);
        if self.rest.len() > MAX_LINE {
            self.rest.clear();
        }
        if let Some(limit) = self.options.limit {
            let left = usize::try_from(limit.saturating_sub(self.sent)).unwrap_or(usize::MAX);
            out.truncate(left);
        }
        self.sent += out.len() as u64;
        Bytes::from(out)
    }
}

/// Writes one line if it is wanted; says whether it goes on in the next.
fn write(out: &mut Vec<u8>, line: &[u8], options: &Options, open: bool) -> bool {
    let Some(line) = parse(line) else { return open };
    if options.stream.is_some_and(|s| s.as_bytes() != line.stream) {
        return open;
    }
    if let Some(since) = options.since {
        let time = std::str::from_utf8(line.time).ok().and_then(|t| t.parse::<Timestamp>().ok());
        if time.is_some_and(|t| t < since) {
            return open;
        }
    }
    if options.timestamps && !open {
        push_time(out, line.time);
        out.push(b' ');
    }
    out.extend_from_slice(line.content);
    if !line.partial {
        out.push(b'\n');
    }
    line.partial
}

/// A time with all nine digits of its seconds' fraction, whatever the runtime wrote. As `RFC3339NanoFixed`.
fn push_time(out: &mut Vec<u8>, time: &[u8]) {
    const SECONDS_END: usize = "2006-01-02T15:04:05".len();
    const DIGITS: usize = 9;
    let zone = time.iter().skip(SECONDS_END).position(|b| matches!(b, b'Z' | b'+' | b'-'));
    let Some(zone) = zone.map(|at| at + SECONDS_END) else { return out.extend_from_slice(time) };
    out.extend_from_slice(&time[..zone]);
    if zone == SECONDS_END {
        out.push(b'.');
    }
    let digits = zone.saturating_sub(SECONDS_END + 1);
    out.extend(std::iter::repeat_n(b'0', DIGITS.saturating_sub(digits)));
    out.extend_from_slice(&time[zone..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "2026-01-01T00:00:00.1Z stdout F one\n2026-01-01T00:00:01.1Z stderr P tw\n2026-01-01T00:00:01.2Z stderr F o\n2026-01-01T00:00:02.1Z stdout F \n2026-01-01T00:00:03.1Z stdout F three\n";

    fn all(query: &str) -> String {
        let mut lines = Lines::new(Options::parse(query).unwrap());
        // In small blocks, as they may come.
        let out: Vec<u8> = LOG.as_bytes().chunks(7).flat_map(|c| lines.take(c)).collect();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_put_together_and_selected() {
        for (query, want) in [
            ("", "one\ntwo\n\nthree\n"),
            ("stream=Stderr", "two\n"),
            ("limitBytes=6", "one\ntw"),
            ("sinceTime=2026-01-01T00:00:02Z", "\nthree\n"),
            (
                "timestamps=true&stream=Stdout",
                "2026-01-01T00:00:00.100000000Z one\n2026-01-01T00:00:02.100000000Z \n2026-01-01T00:00:03.100000000Z three\n",
            ),
        ] {
            assert_eq!(all(query), want, "{query}");
        }
        assert!(Options::parse("tailLines=-1").is_err());
        assert!(Options::parse("sinceTime=yesterday").is_err());
    }

    #[test]
    fn times_have_nine_digits() {
        for (time, want) in [
            ("2026-01-01T00:00:00.123456789Z", "2026-01-01T00:00:00.123456789Z"),
            ("2026-01-01T00:00:00.12+02:00", "2026-01-01T00:00:00.120000000+02:00"),
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000000000Z"),
            ("now", "now"),
        ] {
            let mut out = Vec::new();
            push_time(&mut out, time.as_bytes());
            assert_eq!(String::from_utf8(out).unwrap(), want);
        }
    }

    #[tokio::test]
    async fn tails_count_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, LOG).unwrap();
        let mut file = File::open(&path).await.unwrap();
        for (lines, want) in
            [(0, ""), (1, "three\n"), (2, "\nthree\n"), (3, "two\n\nthree\n"), (9, "one\ntwo\n\nthree\n")]
        {
            let from = usize::try_from(tail_offset(&mut file, lines).await.unwrap()).unwrap();
            let mut out = Lines::new(Options::default());
            assert_eq!(out.take(&LOG.as_bytes()[from..]), want.as_bytes(), "{lines}");
        }
    }
}
