//! `dataset/tokenizer`: trains a byte-level BPE on what will really be tokenised, the rendered
//! rows, cut at the special tokens as the tokenizer will cut them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use checkpoint::chat::Template;
use dataset::tokenizer::Tokenizer as Params;
use serde_json::{Value, json};
use step::Failure;
use step::worker::{Job, Progress};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::parse::{self, Placed, Row};

pub fn run(job: &Job) -> Result<()> {
    let params: Params = job.params()?;
    let source_path = template_file(&job.input("template")?.path)?;
    let source = std::fs::read_to_string(&source_path)
        .with_context(|| format!("cannot read {}", source_path.display()))?;
    let origin = PathBuf::from(&job.input("template")?.origin);
    let template = Template::new(origin, source.clone(), None, Some(params.eos_token.clone()))
        .map_err(Failure::from)?;

    let (mut rows, broken) =
        parse::sound(parse::read(job.inputs("examples"), params.format, &[])?, params.on_broken)?;
    rows.truncate(params.max_rows.map_or(usize::MAX, |n| n as usize));
    let mut texts = Vec::new();
    for Placed { place, row, .. } in &rows {
        let text = match row {
            Row::Text(text) => text.clone(),
            Row::Messages(messages) => template
                .render(messages, false)
                .map_err(|e| Failure::input(format!("{place}: {e}")))?,
        };
        texts.extend(between(&text, &params.special_tokens));
    }
    job.progress(progress("rows", rows.len(), rows.len()));

    let tokenizer = train(&params, &texts)?;
    let size = tokenizer.get_vocab_size(true);
    if size < params.vocab_size as usize {
        job.note(format!(
            "the rows hold pieces for {size} tokens only, {} were asked for",
            params.vocab_size
        ));
    }
    if !broken.is_empty() {
        job.note(format!("{} lines are no rows and were left out", broken.len()));
    }
    job.metric("vocab_size", size as f64);
    let bytes: usize = texts.iter().map(String::len).sum();
    let mut tokens = 0;
    for text in &texts {
        tokens += tokenizer.encode_fast(text.as_str(), false).map_err(|e| anyhow!(e))?.len();
    }
    job.metric("bytes_per_token", bytes as f64 / tokens.max(1) as f64);

    write(job.out(), &params, &tokenizer, &source)?;
    // What the exports will do, tried here: a template that cannot be trained on is found now.
    Template::from_dir(job.out()).and_then(|t| t.end_of_turn()).map_err(Failure::from)?;
    Ok(())
}

fn train(params: &Params, texts: &[String]) -> Result<Tokenizer> {
    let bytes = ByteLevel::new(false, false, true);
    let pieces: PreTokenizerWrapper = match params.single_digits {
        true => Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into(),
        false => bytes.into(),
    };
    let special: Vec<AddedToken> =
        params.special_tokens.iter().map(|t| AddedToken::from(t.clone(), true)).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(params.vocab_size as usize)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(pieces)).with_decoder(Some(bytes));
    tokenizer
        .train(&mut TrainerWrapper::BpeTrainer(trainer), texts.iter())
        .map_err(|e| anyhow!("the tokenizer cannot be trained: {e}"))?;
    Ok(tokenizer)
}

fn write(out: &Path, params: &Params, tokenizer: &Tokenizer, template: &str) -> Result<()> {
    let special: serde_json::Map<String, Value> = params
        .special_tokens
        .iter()
        .map(|token| {
            let id = tokenizer.token_to_id(token).expect("special tokens were trained in");
            let about = json!({
                "content": token, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": true
            });
            (id.to_string(), about)
        })
        .collect();
    let others: BTreeSet<&String> = params
        .special_tokens
        .iter()
        .filter(|t| **t != params.eos_token && **t != params.pad_token)
        .collect();
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": special,
        "additional_special_tokens": others,
        "bos_token": null,
        "eos_token": params.eos_token,
        "pad_token": params.pad_token,
        "unk_token": null,
        "add_bos_token": false,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "chat_template": template,
    });
    let map = json!({
        "eos_token": params.eos_token,
        "pad_token": params.pad_token,
        "additional_special_tokens": others,
    });
    let own = tokenizer.to_string(true).map_err(|e| anyhow!(e))? + "\n";
    for (name, text) in [
        ("tokenizer.json", own),
        ("tokenizer_config.json", serde_json::to_string_pretty(&config)? + "\n"),
        ("special_tokens_map.json", serde_json::to_string_pretty(&map)? + "\n"),
        ("chat_template.jinja", template.to_string()),
    ] {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The one file of the input.
fn template_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    let entries = path.read_dir().with_context(|| format!("cannot read {}", path.display()))?;
    let files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    match files.as_slice() {
        [one] => Ok(one.clone()),
        _ => Err(Failure::input(format!(
            "`template` is one file, {} has {}",
            path.display(),
            files.len()
        ))
        .into()),
    }
}

/// The pieces of `text` between special tokens.
fn between(text: &str, special: &[String]) -> Vec<String> {
    let mut pieces = vec![text.to_string()];
    for token in special {
        pieces = pieces
            .iter()
            .flat_map(|piece| piece.split(token.as_str()).map(str::to_string))
            .collect();
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

pub fn progress(phase: &str, done: usize, total: usize) -> Progress {
    Progress {
        phase: phase.into(),
        done: done as u64,
        total: total as u64,
        unit: "rows".into(),
        values: Default::default(),
    }
}
