// What the page needs of the browser itself: keys, focus, clipboard, names for assistive software.
window.rlhfKit = (() => {
  const byId = (id) => document.getElementById(id);
  const press = (id) => {
    const button = byId(id);
    if (button && !button.disabled && button.offsetParent !== null) button.click();
  };
  const VOTES = { 1: "vote-a", 2: "vote-b", 3: "vote-tie", 4: "vote-both_bad", n: "another" };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      press("stop");
      press("stop-both");
      return;
    }
    const typing = event.target.closest("input:not([type=checkbox]), textarea, select, [role=listbox]");
    const on = document.querySelector("#shortcuts input");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || (on && !on.checked)) return;
    const id = VOTES[event.key];
    if (id && byId("panes")?.offsetParent) {
      event.preventDefault();
      press(id);
    }
  });

  const dark = () => document.body.classList.contains("dark");
  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) document.body.classList.toggle("dark", !dark());
  });

  const describe = (id, attributes) => {
    const part = byId(id);
    for (const [key, value] of Object.entries(attributes)) part?.setAttribute(key, value);
    return part;
  };
  let follow = true;
  const changed = () => {
    // A region must be live before its words change, and outlive them: this wrapper does.
    describe("announcement", { role: "status", "aria-live": "polite" });
    for (const side of ["a", "b"]) {
      describe(`pane-${side}`, { role: "region", "aria-labelledby": `title-${side}` });
    }
    describe("votes", { role: "group", "aria-labelledby": "votes-label" });
    const talk = describe("talk", { role: "log", "aria-live": "off", tabindex: "0" });
    if (!talk) return;
    talk.setAttribute("aria-labelledby", "talk-title");
    talk.onscroll = () => {
      follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    };
    if (follow) talk.scrollTop = talk.scrollHeight;
  };
  // The root, not the body: this script may run before there is one, or long after.
  new MutationObserver(changed).observe(document.documentElement, {
    childList: true,
    subtree: true,
  });

  return {
    focus: (selector) => requestAnimationFrame(() => document.querySelector(selector)?.focus()),
    flash: (button) => {
      button.classList.add("done");
      button.addEventListener("blur", () => button.classList.remove("done"), { once: true });
    },
    speak: (language) => {
      document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
      document.documentElement.dataset.ready = language;
    },
    copyLink: (link) => {
      history.replaceState(null, "", link);
      navigator.clipboard?.writeText(location.href);
    },
    download: (name, text) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
      link.download = name;
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
})();
