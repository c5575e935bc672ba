// The model's chat template through llama.cpp's own Jinja: the C API knows a few templates by
// heart and takes any other for one of them.

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "jinja/value.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

namespace {

struct Chat {
    jinja::program program;
    std::string    source;
    std::string    bos;
    std::string    eos;
};

jinja::value text(const std::string & text) {
    return jinja::mk_val<jinja::value_string>(text);
}

char * copied(const std::string & text) {
    char * out = static_cast<char *>(std::malloc(text.size() + 1));
    if (out != nullptr) {
        std::memcpy(out, text.c_str(), text.size() + 1);
    }
    return out;
}

}  // namespace

extern "C" {

void * anneal_chat_new(const char * source, const char * bos, const char * eos, char ** error) {
    try {
        const auto tokens = jinja::lexer().tokenize(source);
        return new Chat{jinja::parse_from_tokens(tokens), tokens.source, bos, eos};
    } catch (const std::exception & e) {
        *error = copied(e.what());
    }
    return nullptr;
}

void anneal_chat_free(void * chat) {
    delete static_cast<Chat *>(chat);
}

// The prompt, or null and what is wrong. Both are freed with anneal_text_free.
char * anneal_chat_prompt(const void * pointer, const char * const * roles,
                          const char * const * contents, size_t n, char ** error) {
    try {
        const Chat * chat = static_cast<const Chat *>(pointer);
        auto messages = jinja::mk_val<jinja::value_array>();
        for (size_t i = 0; i < n; i++) {
            auto message = jinja::mk_val<jinja::value_object>();
            message->insert("role", text(roles[i]));
            message->insert("content", text(contents[i]));
            messages->push_back(message);
        }
        jinja::context context(chat->source);
        context.set_val("messages", messages);
        context.set_val("bos_token", text(chat->bos));
        context.set_val("eos_token", text(chat->eos));
        context.set_val("add_generation_prompt", jinja::mk_val<jinja::value_bool>(true));
        jinja::runtime runtime(context);
        const auto parts = jinja::runtime::gather_string_parts(runtime.execute(chat->program));
        return copied(parts->as_string().str());
    } catch (const std::exception & e) {
        *error = copied(e.what());
    }
    return nullptr;
}

void anneal_text_free(char * text) {
    std::free(text);
}

}
