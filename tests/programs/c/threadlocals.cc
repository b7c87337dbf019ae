// thread_local objects with destructors that allocate, free, and use others, in threads of every end and in main.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>
static std::atomic<uint64_t> ended{0}, sum{0};
struct Kept {
    std::vector<std::unique_ptr<std::string>> parts;
    std::map<int, std::string> names;
    ~Kept() {
        uint64_t own = 0;
        for (auto &part : parts) own += part->size() + (unsigned char)(*part)[part->size() / 2];
        // The last acts of a thread: more memory than it ever had, taken and given back.
        std::vector<std::string> late(50, std::string(20000, 'z'));
        for (auto &name : names) own += name.second.size();
        sum += own + late.back().size();
        ended++;
    }
};
static thread_local Kept kept;
static thread_local std::string word = "a word that does not fit into the small buffer of a string";
static void work(int n) {
    for (int i = 0; i < 60; i++) {
        kept.parts.push_back(std::make_unique<std::string>(1000 + n * 37 + i * 101, char('a' + i % 26)));
        kept.names[i * 7 % 31] = word + std::to_string(i * n);
    }
    if (n % 3 == 0) pthread_exit(nullptr);
}
int main() {
    for (int round = 0; round < 60; round++) {
        std::vector<std::thread> threads;
        for (int n = 0; n < 6; n++) threads.emplace_back(work, n);
        for (auto &thread : threads) thread.join();
    }
    work(1);
    std::printf("%llu threads ended, %llu\n", (unsigned long long)ended, (unsigned long long)sum);
}
