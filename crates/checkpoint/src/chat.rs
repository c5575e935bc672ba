//! Chats as text and as tokens: the chat template and the tokenizer of a model folder.
//!
//! Knows nothing of datasets. What is supervised comes from rendering, never from a search for
//! markers in the text.

use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;
use crate::tokens::Vocab;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    pub content: String,
}

/// A model's chat template, with the special tokens that it names.
#[derive(Debug)]
pub struct Template {
    path: PathBuf,
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// What the assistant says, as byte ranges of `text`: from where the model would begin to
    /// write, to the end of the token that ends its turn.
    pub supervised: Vec<Range<usize>>,
}

impl Template {
    /// Reads `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let config_path = dir.join("tokenizer_config.json");
        let config = match config_path.exists() {
            true => json(&config_path)?,
            false => Value::Null,
        };
        let own = dir.join("chat_template.jinja");
        let (path, source) = match std::fs::read_to_string(&own) {
            Ok(source) => (own, source),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let inline = inline_template(&config).ok_or_else(|| Error::Template {
                    path: dir.into(),
                    message: "no chat template: neither chat_template.jinja nor `chat_template` \
                              in tokenizer_config.json"
                        .into(),
                })?;
                (config_path, inline.to_string())
            }
            Err(e) => return Err(Error::io(&own, e)),
        };
        let token = |key: &str| special_token(&config, key);
        Self::new(path, source, token("bos_token"), token("eos_token"))
    }

    /// A template from its text; `path` is named in errors.
    pub fn new(
        path: PathBuf,
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        // As transformers sets up Jinja.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<(), _> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        let message =
            |e: minijinja::Error| Error::Template { path: path.clone(), message: with_cause(&e) };
        environment.add_template_owned("chat", source).map_err(message)?;
        Ok(Self { path, environment, bos_token, eos_token })
    }

    /// A conversation as text; with `add_generation_prompt`, up to where the answer begins.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let template = self.environment.get_template("chat").expect("added when it was made");
        template
            .render(context! {
                messages,
                add_generation_prompt,
                bos_token => self.bos_token.as_deref().unwrap_or_default(),
                eos_token => self.eos_token.as_deref().unwrap_or_default(),
                tools => None::<()>,
                documents => None::<()>,
            })
            .map_err(|e| self.failed(with_cause(&e)))
    }

    /// A conversation as text, and what of it the assistant says.
    ///
    /// Each assistant turn is what rendering it adds to the prompt before it. A template that
    /// renders earlier turns differently once later ones follow is refused: a model trained on such
    /// text would never see the prompts that it is asked at run time.
    pub fn render_spans(&self, messages: &[Message]) -> Result<Rendered, Error> {
        let text = self.render(messages, false)?;
        let mut supervised = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let prompt = self.render(&messages[..i], true)?;
            let answered = self.render(&messages[..=i], false)?;
            let answer = answered.strip_prefix(prompt.as_str());
            let Some(answer) = answer.filter(|_| text.starts_with(&answered)) else {
                return Err(self.failed(format!(
                    "turn {} does not begin where its generation prompt ends: this template \
                     cannot be trained on",
                    i + 1
                )));
            };
            // What follows the end-of-turn token is there for the next turn.
            let end = prompt.len() + answer.trim_end().len();
            supervised.push(prompt.len()..end.max(prompt.len()));
        }
        Ok(Rendered { text, supervised })
    }

    /// The text that ends the assistant's turn: `<|im_end|>`.
    pub fn end_of_turn(&self) -> Result<String, Error> {
        let turn =
            |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let rendered = self.render_spans(&[turn("user", "a"), turn("assistant", "b")])?;
        let said = rendered.supervised.first().map_or("", |span| &rendered.text[span.clone()]);
        Ok(said.trim_start().strip_prefix('b').unwrap_or(said).to_string())
    }

    fn failed(&self, message: String) -> Error {
        Error::Template { path: self.path.clone(), message }
    }
}

/// A model's tokenizer. It adds no special token by itself: the template writes them all.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    end_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and what ends an answer from the configs beside it.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::Tokenizer { path: path.clone(), message: e.to_string() })?;
        // Rows are cut and padded by those who know how long they may be.
        inner.with_padding(None);
        let uncut = inner.with_truncation(None).map(|_| ());
        uncut.map_err(|e| Error::Tokenizer { path: path.clone(), message: e.to_string() })?;
        let mut tokenizer = Self { path, inner, end_ids: Vec::new() };
        tokenizer.end_ids = find_end_ids(dir, |token| tokenizer.token_id(token))?;
        Ok(tokenizer)
    }

    /// The tokens that end an answer: those of generation_config.json and config.json, the
    /// tokenizer's `eos_token`, and the template's end of turn. Ascending.
    pub fn end_ids(&self) -> Vec<u32> {
        self.end_ids.clone()
    }

    /// Tokens, added ones counted.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Special tokens in the text are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| self.failed(&*e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a conversation, each with whether the model learns to write it.
    pub fn encode_spans(&self, rendered: &Rendered) -> Result<Vec<(u32, bool)>, Error> {
        let encoding =
            self.inner.encode(rendered.text.as_str(), false).map_err(|e| self.failed(&*e))?;
        let said = |&(start, end): &(usize, usize)| {
            rendered.supervised.iter().any(|span| start < span.end && end > span.start)
        };
        let supervised = encoding.get_offsets().iter().map(said);
        Ok(encoding.get_ids().iter().copied().zip(supervised).collect())
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special_tokens).map_err(|e| self.failed(&*e))
    }

    fn failed(&self, error: &(dyn std::error::Error + Send + Sync)) -> Error {
        Error::Tokenizer { path: self.path.clone(), message: error.to_string() }
    }
}

/// [`Tokenizer::end_ids`] of a folder, without the time that its tokenizer takes to set up.
pub fn end_ids(dir: &Path) -> Result<Vec<u32>, Error> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
        model: Model,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    #[derive(Deserialize)]
    struct Model {
        vocab: Vocab,
    }
    let path = dir.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let File { added_tokens, model } = serde_json::from_slice(&bytes)
        .map_err(|e| Error::Parse { path, message: e.to_string() })?;
    let added = added_tokens.into_iter().map(|token| (token.content, token.id));
    let tokens: Vec<(String, u32)> = model.vocab.0.into_iter().chain(added).collect();
    find_end_ids(dir, |text| tokens.iter().find(|(token, _)| token == text).map(|(_, id)| *id))
}

fn find_end_ids(dir: &Path, id: impl Fn(&str) -> Option<u32>) -> Result<Vec<u32>, Error> {
    let mut found = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        match &json(&path)?["eos_token_id"] {
            Value::Array(all) => found.extend(all.iter().filter_map(Value::as_u64)),
            one => found.extend(one.as_u64()),
        }
    }
    let mut ids: Vec<u32> = found.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
    let path = dir.join("tokenizer_config.json");
    if path.exists() {
        let eos = special_token(&json(&path)?, "eos_token");
        ids.extend(eos.and_then(|token| id(&token)));
    }
    // A tokenizer without a template has no turns to end.
    if let Ok(end) = Template::from_dir(dir).and_then(|template| template.end_of_turn()) {
        ids.extend(id(&end));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn json(path: &Path) -> Result<Value, Error> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::Parse { path: path.into(), message: e.to_string() })
}

/// `chat_template` as a string, or the one named `default` of a list.
fn inline_template(config: &Value) -> Option<&str> {
    match config.get("chat_template")? {
        Value::String(source) => Some(source),
        Value::Array(named) => {
            named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str())
        }
        _ => None,
    }
}

/// A special token of tokenizer_config.json: a string, or an object with `content`.
fn special_token(config: &Value, key: &str) -> Option<String> {
    let token = config.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_string)
}

fn with_cause(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    format!("{line}{}", error.detail().map_or_else(|| error.kind().to_string(), str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}\n<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}";

    fn template(source: &str) -> Result<Template, Error> {
        Template::new("chat_template.jinja".into(), source.into(), None, None)
    }

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        let turn = |(role, content): &(&str, &str)| Message {
            role: role.to_string(),
            content: content.to_string(),
        };
        turns.iter().map(turn).collect()
    }

    #[test]
    fn each_answer_is_supervised_to_the_end_of_its_turn() {
        let chat =
            chat(&[("user", "hi"), ("assistant", "yes"), ("user", "yes"), ("assistant", "no")]);
        let rendered = template(CHATML).unwrap().render_spans(&chat).unwrap();
        let said: Vec<&str> =
            rendered.supervised.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(said, ["yes<|im_end|>", "no<|im_end|>"]);
        assert_eq!(template(CHATML).unwrap().end_of_turn().unwrap(), "<|im_end|>");
    }

    #[test]
    fn templates_that_rewrite_the_past_are_refused() {
        let source = "{{ messages | length }}: {{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}";
        let error =
            template(source).unwrap().render_spans(&chat(&[("user", "a"), ("assistant", "b")]));
        assert_eq!(
            error.unwrap_err().to_string(),
            "chat_template.jinja: turn 2 does not begin where its generation prompt ends: this template cannot be trained on"
        );
    }

    #[test]
    fn what_a_template_refuses_is_said() {
        let source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}";
        let error = template(source).unwrap().render(&chat(&[("system", "a")]), false).unwrap_err();
        assert_eq!(error.to_string(), "chat_template.jinja: line 1: no system turn");
        assert!(template("{% for").is_err());
    }

    #[test]
    fn python_methods_are_there() {
        let source = "{{ messages[0].content.strip().upper() }}";
        assert_eq!(
            template(source).unwrap().render(&chat(&[("user", " a ")]), false).unwrap(),
            "A"
        );
    }

    #[test]
    fn ends_are_found_without_a_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        let added = |id: u32, text: &str| {
            serde_json::json!({"id": id, "content": text, "special": true, "lstrip": false,
                "rstrip": false, "normalized": false, "single_word": false})
        };
        let unigram = serde_json::json!({"type": "Unigram", "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]});
        let words = serde_json::json!({"type": "WordLevel", "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "a": 2, "</s>": 1}});
        for model in [unigram, words] {
            let files = [
                (
                    "tokenizer.json",
                    serde_json::json!({"version": "1.0", "model": model,
                        "added_tokens": [added(1, "</s>"), added(3, "<|im_end|>")]}),
                ),
                (
                    "tokenizer_config.json",
                    serde_json::json!({"eos_token": "</s>", "chat_template": CHATML}),
                ),
                ("generation_config.json", serde_json::json!({"eos_token_id": [2]})),
            ];
            for (name, json) in files {
                std::fs::write(dir.path().join(name), json.to_string()).unwrap();
            }
            assert_eq!(end_ids(dir.path()).unwrap(), [1, 2, 3]);
            assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().end_ids(), [1, 2, 3]);
        }
    }
}
