//! A chat template in llama.cpp's Jinja.
//!
//! Knows nothing of tokens.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{NonNull, null_mut};

use crate::Error;

unsafe extern "C" {
    fn anneal_chat_new(
        source: *const c_char,
        bos: *const c_char,
        eos: *const c_char,
        error: *mut *mut c_char,
    ) -> *mut c_void;
    fn anneal_chat_free(templates: *mut c_void);
    fn anneal_chat_prompt(
        templates: *const c_void,
        roles: *const *const c_char,
        contents: *const *const c_char,
        n: usize,
        error: *mut *mut c_char,
    ) -> *mut c_char;
    fn anneal_text_free(text: *mut c_char);
}

/// A parsed template. The pointer came from `anneal_chat_new` and is freed once.
#[derive(Debug)]
pub(crate) struct Chat(NonNull<c_void>);

// SAFETY: the object is bound to no thread, and is changed by nobody after it was made.
unsafe impl Send for Chat {}

impl Chat {
    pub(crate) fn new(source: &str, bos: &str, eos: &str) -> Result<Self, Error> {
        let [source, bos, eos] = [text(source)?, text(bos)?, text(eos)?];
        let mut error = null_mut();
        // SAFETY: three C strings that outlive the call, and a place for a fourth.
        let templates =
            unsafe { anneal_chat_new(source.as_ptr(), bos.as_ptr(), eos.as_ptr(), &raw mut error) };
        NonNull::new(templates).map(Chat).ok_or_else(|| failed(error))
    }

    /// The conversation as text, up to where the answer begins.
    pub(crate) fn prompt(&self, messages: &[(&str, &str)]) -> Result<String, Error> {
        let mut roles = Vec::new();
        let mut contents = Vec::new();
        for (role, content) in messages {
            roles.push(text(role)?);
            contents.push(text(content)?);
        }
        let pointers = |all: &[CString]| all.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let (role_pointers, content_pointers) = (pointers(&roles), pointers(&contents));
        let mut error = null_mut();
        // SAFETY: both lists hold `messages.len()` C strings that outlive the call.
        let prompt = unsafe {
            anneal_chat_prompt(
                self.0.as_ptr(),
                role_pointers.as_ptr(),
                content_pointers.as_ptr(),
                messages.len(),
                &raw mut error,
            )
        };
        taken(prompt).ok_or_else(|| failed(error))
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        // SAFETY: made by `anneal_chat_new`, and nobody else frees it.
        unsafe { anneal_chat_free(self.0.as_ptr()) }
    }
}

fn text(text: &str) -> Result<CString, Error> {
    CString::new(text)
        .map_err(|_| Error::Template { message: "a NUL character in the conversation".into() })
}

/// The text of a C string that is ours to free.
fn taken(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: a C string from `chat.cpp`, freed once and not used after.
    unsafe {
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        anneal_text_free(text);
        Some(owned)
    }
}

fn failed(error: *mut c_char) -> Error {
    Error::Template { message: taken(error).unwrap_or_else(|| "out of memory".into()) }
}
