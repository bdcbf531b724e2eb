//! Links of what comes back through a proxy: a backend knows nothing of the path under which it is seen, so its redirects and
//! the links of its pages are led back below it. Pure. As `proxyutil.Transport`.
use url::Url;

/// Attributes of HTML that hold a link.
const LINKS: [&str; 16] = [
    "action",
    "background",
    "cite",
    "classid",
    "codebase",
    "data",
    "formaction",
    "href",
    "icon",
    "longdesc",
    "manifest",
    "poster",
    "profile",
    "src",
    "usemap",
    "xlink:href",
];
/// Elements whose content is no markup.
const RAW: [&str; 2] = ["script", "style"];

/// Where a backend is seen, and by which names it calls itself.
pub struct Seen<'a> {
    /// `/api/v1/namespaces/a/pods/p/proxy`.
    pub below: &'a str,
    /// The backend's own authority, and the one the client asked for.
    pub hosts: [&'a str; 2],
}

// === impl Seen ===

impl Seen<'_> {
    /// A link as the client can follow it. Relative ones can be followed as they are; others' lead elsewhere.
    pub fn link(&self, link: &str) -> Option<String> {
        let path = if link.starts_with('/') && !link.starts_with("//") {
            link.to_owned()
        } else {
            let absolute = if link.starts_with("//") { format!("http:{link}") } else { link.to_owned() };
            let url = Url::parse(&absolute).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
            let host = url.host_str()?;
            let named = |ours: &&str| *ours == host && url.port().is_none();
            let with_port = format!("{host}:{}", url.port_or_known_default()?);
            self.hosts
                .iter()
                .any(|ours| named(ours) || *ours == with_port)
                .then(|| url[url::Position::BeforePath..].to_owned())?
        };
        if path.starts_with(self.below) { Some(path) } else { Some(format!("{}{path}", self.below)) }
    }

    /// A page with its links led back. What is no well-formed tag stays as it is.
    pub fn page(&self, page: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(page.len() + page.len() / 16);
        let mut rest = page;
        while let Some(at) = rest.iter().position(|byte| *byte == b'<') {
            let (text, tag) = rest.split_at(at);
            out.extend_from_slice(text);
            if tag.starts_with(b"<!--") {
                let end = find(tag, b"-->").map_or(tag.len(), |end| end + 3);
                out.extend_from_slice(&tag[..end]);
                rest = &tag[end..];
                continue;
            }
            let Some(end) = end_of_tag(tag).filter(|_| tag.get(1).is_some_and(u8::is_ascii_alphabetic)) else {
                out.push(b'<');
                rest = &tag[1..];
                continue;
            };
            self.tag(&tag[..end], &mut out);
            rest = &tag[end..];
            let name: Vec<u8> = tag[1..].iter().copied().take_while(u8::is_ascii_alphanumeric).collect();
            if let Some(raw) = RAW.iter().find(|raw| name.eq_ignore_ascii_case(raw.as_bytes())) {
                let closing = format!("</{raw}").into_bytes();
                let content = rest.windows(closing.len()).position(|window| window.eq_ignore_ascii_case(&closing));
                let (content, after) = rest.split_at(content.unwrap_or(rest.len()));
                out.extend_from_slice(content);
                rest = after;
            }
        }
        out.extend_from_slice(rest);
        out
    }

    /// One tag, from `<` to `>`.
    fn tag(&self, tag: &[u8], out: &mut Vec<u8>) {
        let mut at = tag.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'/').unwrap_or(tag.len());
        out.extend_from_slice(&tag[..at]);
        while at < tag.len() {
            let start = at;
            while at < tag.len() && (tag[at].is_ascii_whitespace() || matches!(tag[at], b'/' | b'=' | b'>')) {
                at += 1;
            }
            let name = at;
            while at < tag.len() && !tag[at].is_ascii_whitespace() && !matches!(tag[at], b'=' | b'>') {
                at += 1;
            }
            let attribute = String::from_utf8_lossy(&tag[name..at]).to_ascii_lowercase();
            let mut value = at;
            while value < tag.len() && tag[value].is_ascii_whitespace() {
                value += 1;
            }
            if tag.get(value) != Some(&b'=') {
                out.extend_from_slice(&tag[start..at]);
                continue;
            }
            value += 1;
            while value < tag.len() && tag[value].is_ascii_whitespace() {
                value += 1;
            }
            let quote = tag.get(value).copied().filter(|byte| matches!(byte, b'"' | b'\''));
            value += usize::from(quote.is_some());
            let ends = |byte: &u8| quote.map_or(byte.is_ascii_whitespace() || *byte == b'>', |quote| *byte == quote);
            let end = tag[value.min(tag.len())..].iter().position(ends).map_or(tag.len(), |length| value + length);
            let link =
                std::str::from_utf8(&tag[value.min(end)..end]).ok().filter(|_| LINKS.contains(&attribute.as_str()));
            out.extend_from_slice(&tag[start..value.min(end)]);
            match link.and_then(|link| self.link(link)) {
                Some(link) => out.extend_from_slice(link.as_bytes()),
                None => out.extend_from_slice(&tag[value.min(end)..end]),
            }
            at = end;
            if quote.is_some() && at < tag.len() {
                out.push(tag[at]);
                at += 1;
            }
        }
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

/// Behind the `>` that ends a tag; one in quotes does not.
fn end_of_tag(tag: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (at, byte) in tag.iter().enumerate() {
        match (quote, byte) {
            (None, b'>') => return Some(at + 1),
            (None, b'"' | b'\'') => quote = Some(*byte),
            (Some(open), byte) if open == *byte => quote = None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEEN: Seen<'_> = Seen { below: "/p/proxy", hosts: ["10.0.0.1:80", "api:6443"] };

    #[test]
    fn links_lead_back_below_the_proxy() {
        for (link, expected) in [
            ("/x?y#z", Some("/p/proxy/x?y#z")),
            ("/p/proxy/x", Some("/p/proxy/x")),
            ("http://10.0.0.1:80/x", Some("/p/proxy/x")),
            ("http://api:6443/x/?a=b", Some("/p/proxy/x/?a=b")),
            ("//api:6443/x", Some("/p/proxy/x")),
            ("https://elsewhere/x", None),
            ("x/y", None),
            ("mailto:a@b", None),
            ("#top", None),
        ] {
            assert_eq!(SEEN.link(link).as_deref(), expected, "{link}");
        }
    }

    #[test]
    fn a_page_keeps_all_but_its_links() {
        for (page, expected) in [
            ("<a href=\"/rewriteme\">test</a>", "<a href=\"/p/proxy/rewriteme\">test</a>"),
            ("<A class=x HREF='/x' >a < b</A>", "<A class=x HREF='/p/proxy/x' >a < b</A>"),
            ("<img src=/i.png/>", "<img src=/p/proxy/i.png/>"),
            (
                "<img alt='a > b' src = \"/i\"><p title=\"/x\">",
                "<img alt='a > b' src = \"/p/proxy/i\"><p title=\"/x\">",
            ),
            ("<script src='/s'>\"<a href='/x'>\"</script>", "<script src='/p/proxy/s'>\"<a href='/x'>\"</script>"),
            ("<!-- <a href='/x'> --><a href=>", "<!-- <a href='/x'> --><a href=>"),
            ("<a href='/cut", "<a href='/cut"),
        ] {
            assert_eq!(String::from_utf8(SEEN.page(page.as_bytes())).unwrap(), expected, "{page}");
        }
    }

    proptest! {
        #[test]
        fn no_page_panics_and_none_without_links_changes(page in "[<>a-z='\" /!-]{0,60}") {
            let rewritten = SEEN.page(page.as_bytes());
            if !page.contains('=') {
                prop_assert_eq!(rewritten, page.as_bytes());
            }
        }
    }
}
