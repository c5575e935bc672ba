//! The Modelfile beside a GGUF file, by which Ollama imports it: `ollama create NAME -f Modelfile`.
//!
//! Ollama does not run the file's own Jinja: it knows some forty templates by sight, and sends what it
//! does not know as plain text (its docs/template.md). So a template that only puts something before
//! and after each turn, which most are, is written in Ollama's own language, once it has been tried on
//! conversations.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::chat::{Message, Template};

use crate::format::Value;

/// Positions that are asked for: a cache of all that a model knows may be more than there is memory.
const MOST_POSITIONS: u32 = 8192;

/// Writes it into the folder `out`, for the file `name` with these keys, of the model in `dir`. Gives
/// what it could not say.
pub fn write(
    dir: &Path,
    out: &Path,
    name: &str,
    keys: &[(String, Value)],
) -> Result<Option<String>> {
    let mut text = format!("FROM ./{name}\n");
    let template = Template::from_dir(dir).ok();
    let turns = template.as_ref().map(|template| {
        Turns::of(template, text_of(keys, "bos").unwrap_or_default())
            .filter(|turns| turns.are_those_of(template))
            .and_then(|turns| turns.in_go(adds_bos(keys)))
    });
    if let Some(Some(go)) = &turns {
        _ = writeln!(text, "TEMPLATE \"\"\"{go}\"\"\"");
    }
    for stop in stops(template.as_ref(), keys) {
        _ = writeln!(text, "PARAMETER stop \"{stop}\"");
    }
    let context = keys.iter().find(|(key, _)| key.ends_with(".context_length"));
    if let Some((_, Value::U32(context))) = context {
        _ = writeln!(text, "PARAMETER num_ctx {}", context.min(&MOST_POSITIONS));
    }
    let licence = std::fs::read_to_string(dir.join("LICENSE")).unwrap_or_default();
    if !licence.trim().is_empty() && !licence.contains("\"\"\"") {
        _ = writeln!(text, "LICENSE \"\"\"\n{}\n\"\"\"", licence.trim_end());
    }
    let path = out.join("Modelfile");
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    let said = "the chat template does more than put something around each turn: the Modelfile leaves \
                it to Ollama, which takes one of its own if it knows this one by sight";
    Ok(matches!(turns, Some(None)).then(|| said.into()))
}

/// What ends an answer, each once.
fn stops(template: Option<&Template>, keys: &[(String, Value)]) -> Vec<String> {
    let turn = template.and_then(|template| template.end_of_turn().ok());
    let tokens = ["eos", "eot", "eom"].map(|role| text_of(keys, role).map(str::to_string));
    let mut stops: Vec<String> = Vec::new();
    for stop in turn.into_iter().chain(tokens.into_iter().flatten()) {
        let is_plain = !stop.is_empty() && !stop.contains(['"', '\\']) && stop.trim() == stop;
        if is_plain && !stops.contains(&stop) {
            stops.push(stop);
        }
    }
    stops
}

/// The token with a part to play.
fn text_of<'a>(keys: &'a [(String, Value)], role: &str) -> Option<&'a str> {
    let find = |name: &str| keys.iter().find(|(key, _)| key == name).map(|(_, value)| value);
    match (find(&format!("tokenizer.ggml.{role}_token_id")), find("tokenizer.ggml.tokens")) {
        (Some(Value::U32(id)), Some(Value::Texts(texts))) => {
            texts.get(*id as usize).map(String::as_str)
        }
        _ => None,
    }
}

fn adds_bos(keys: &[(String, Value)]) -> bool {
    keys.contains(&("tokenizer.ggml.add_bos_token".to_string(), Value::Bool(true)))
}

/// A template that puts something before and after each turn, by role.
#[derive(Debug, PartialEq)]
struct Turns {
    /// The token that begins a text, if the template writes it.
    begin: String,
    /// Before and after what the role says.
    around: [(&'static str, [String; 2]); 3],
    /// What the model goes on from.
    prompt: String,
}

impl Turns {
    /// What the template must be, if it is one of these. `bos` begins a text.
    fn of(template: &Template, bos: &str) -> Option<Self> {
        let show = |roles: &[&'static str], prompt| template.render(&said(roles), prompt).ok();
        let user = show(&["user"], false)?;
        let begin = if !bos.is_empty() && user.starts_with(bos) { bos } else { "" };
        let (before_user, after_user) = user.strip_prefix(begin)?.split_once(words("user"))?;
        let both = show(&["user", "assistant"], false)?;
        let (before, after) = both.strip_prefix(user.as_str())?.split_once(words("assistant"))?;
        let all = show(&["system", "user"], false)?;
        let (before_system, rest) = all.strip_prefix(begin)?.split_once(words("system"))?;
        let user_turn = user.strip_prefix(begin)?;
        let prompted = show(&["user"], true)?;
        let own = |[a, b]: [&str; 2]| [a.to_string(), b.to_string()];
        Some(Self {
            begin: begin.into(),
            around: [
                ("system", own([before_system, rest.strip_suffix(user_turn)?])),
                ("user", own([before_user, after_user])),
                ("assistant", own([before, after])),
            ],
            prompt: prompted.strip_prefix(user.as_str())?.into(),
        })
    }

    /// Whether the template writes the same of conversations. What it does to spaces around what is
    /// said is not looked at: Ollama's language cannot take them away.
    fn are_those_of(&self, template: &Template) -> bool {
        let conversations: [&[&'static str]; 5] = [
            &["user"],
            &["system", "user"],
            &["user", "assistant", "user"],
            &["system", "user", "assistant", "user"],
            &["user", "assistant", "user", "assistant", "user"],
        ];
        conversations.iter().all(|roles| {
            let mut text = self.begin.clone();
            for role in *roles {
                let around = self.around.iter().find(|(name, _)| name == role);
                let [before, after] = &around.expect("one of the three").1;
                text.extend([before, words(role), after]);
            }
            text += &self.prompt;
            template.render(&said(roles), true).is_ok_and(|rendered| rendered == text)
        })
    }

    /// In the language of Go's text/template, if all of it can be written there. With `adds_bos` the
    /// beginning is left to whoever reads the text.
    fn in_go(&self, adds_bos: bool) -> Option<String> {
        let mut go = if adds_bos { String::new() } else { self.begin.clone() };
        go += "{{ range .Messages }}";
        for (i, (role, [before, after])) in self.around.iter().enumerate() {
            let word = if i == 0 { "if" } else { "else if" };
            _ = write!(go, "{{{{ {word} eq .Role \"{role}\" }}}}{before}{{{{ .Content }}}}{after}");
        }
        go += "{{ end }}{{ end }}";
        go += &self.prompt;
        let parts = self.around.iter().flat_map(|(_, around)| around);
        let is_plain = |part: &String| !part.contains("{{") && !part.contains("\"\"\"");
        // A quote at the very end would be one of those that close the text.
        let fits = parts.chain([&self.begin, &self.prompt]).all(is_plain) && !go.ends_with('"');
        fits.then_some(go)
    }
}

/// What a role says in a trial: found again wherever it is put.
fn words(role: &str) -> &'static str {
    match role {
        "system" => "Be7brief",
        "user" => "How8much",
        _ => "Nine9or ten",
    }
}

fn said(roles: &[&'static str]) -> Vec<Message> {
    let message = |role: &&str| Message { role: role.to_string(), content: words(role).into() };
    roles.iter().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Template {
        let token = |text: &str| Some(text.to_string());
        Template::new("t".into(), source.into(), token("<s>"), token("</s>")).unwrap()
    }

    fn go(source: &str, adds_bos: bool) -> Option<String> {
        let template = template(source);
        let turns = Turns::of(&template, "<s>")?;
        if turns.are_those_of(&template) { turns.in_go(adds_bos) } else { None }
    }

    #[test]
    fn a_template_of_turns_is_written_in_ollamas_language() {
        let chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + \
            '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let expected = "{{ range .Messages }}\
            {{ if eq .Role \"system\" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n\
            {{ else if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n\
            {{ else if eq .Role \"assistant\" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n\
            {{ end }}{{ end }}<|im_start|>assistant\n";
        assert_eq!(go(chatml, false).as_deref(), Some(expected));
        // The beginning stands there once.
        let begun = format!("{{{{ bos_token }}}}{chatml}");
        assert_eq!(go(&begun, true).as_deref(), Some(expected));
        assert_eq!(go(&begun, false), Some(format!("<s>{expected}")));
    }

    #[test]
    fn what_is_more_than_turns_is_left_out() {
        let turn = "{{ '[' + m.role + ']' + m.content + '\\n' }}";
        let each = |inside: &str| {
            format!(
                "{{% for m in messages %}}{inside}{{% endfor %}}\
                 {{% if add_generation_prompt %}}[assistant]{{% endif %}}"
            )
        };
        assert!(go(&each(turn), false).is_some());
        for source in [
            // Only the first turn; a default for what the system says; the system's words in the
            // user's turn; no system at all; text of the language itself.
            each(&format!("{{% if loop.first %}}Hello {{% endif %}}{turn}")),
            format!(
                "{{% if messages[0].role != 'system' %}}[system]Hi\n{{% endif %}}{}",
                each(turn)
            ),
            each(
                "{% if m.role != 'system' %}[{{ m.role }}]{% if loop.index0 == 1 %}\
                 {{ messages[0].content }}{% endif %}{{ m.content }}{% endif %}",
            ),
            each(&format!(
                "{{% if m.role == 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{turn}"
            )),
            each(&turn.replace("'['", "'{{ ['")),
        ] {
            assert_eq!(go(&source, false), None, "{source}");
        }
    }

    #[test]
    fn the_file_says_what_ends_an_answer() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("LICENSE", "Do as you like.\n");
        put("chat_template.jinja", "{{ messages[0].content }}");
        let texts = ["<unk>", "<s>", "</s>", "<end>"].map(String::from).to_vec();
        let keys = [
            ("llama.context_length", Value::U32(131_072)),
            ("tokenizer.ggml.tokens", Value::Texts(texts)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.eot_token_id", Value::U32(3)),
        ]
        .map(|(key, value)| (key.to_string(), value));
        let note = write(dir.path(), out.path(), "m.gguf", &keys).unwrap();
        assert!(note.unwrap().starts_with("the chat template does more"));
        let text = std::fs::read_to_string(out.path().join("Modelfile")).unwrap();
        let expected = "FROM ./m.gguf\nPARAMETER stop \"</s>\"\nPARAMETER stop \"<end>\"\n\
            PARAMETER num_ctx 8192\nLICENSE \"\"\"\nDo as you like.\n\"\"\"\n";
        assert_eq!(text, expected);
    }
}
