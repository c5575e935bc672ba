// The model's chat template through llama.cpp's own Jinja: the C API knows a few templates by
// heart and takes any other for one of them.

#include "chat.h"
#include "log.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

static char * copied(const std::string & text) {
    char * out = static_cast<char *>(std::malloc(text.size() + 1));
    if (out != nullptr) {
        std::memcpy(out, text.c_str(), text.size() + 1);
    }
    return out;
}

extern "C" {

void * anneal_chat_new(const char * source, const char * bos, const char * eos, char ** error) {
    try {
        common_log_set_verbosity_thold(-1);
        return common_chat_templates_init(nullptr, source, bos, eos).release();
    } catch (const std::exception & e) {
        *error = copied(e.what());
    }
    return nullptr;
}

void anneal_chat_free(void * templates) {
    common_chat_templates_free(static_cast<common_chat_templates *>(templates));
}

// The prompt, or null and what is wrong. Both are freed with anneal_text_free.
char * anneal_chat_prompt(const void * templates, const char * const * roles,
                          const char * const * contents, size_t n, char ** error) {
    try {
        common_chat_templates_inputs inputs;
        inputs.use_jinja             = true;
        inputs.add_generation_prompt = true;
        // As the template says: no tools, no answer to be parsed.
        inputs.force_pure_content    = true;
        for (size_t i = 0; i < n; i++) {
            common_chat_msg message;
            message.role    = roles[i];
            message.content = contents[i];
            inputs.messages.push_back(message);
        }
        const auto * chat = static_cast<const common_chat_templates *>(templates);
        return copied(common_chat_templates_apply(chat, inputs).prompt);
    } catch (const std::exception & e) {
        *error = copied(e.what());
    }
    return nullptr;
}

void anneal_text_free(char * text) {
    std::free(text);
}

}
