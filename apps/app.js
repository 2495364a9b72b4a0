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

  // A region must be live before its words change, and outlive them: the wrapper is, and does.
  const name = () => {
    const region = byId("announcement");
    if (!region) return false;
    region.setAttribute("role", "status");
    region.setAttribute("aria-live", "polite");
    for (const side of ["a", "b"]) {
      const pane = byId(`pane-${side}`);
      pane?.setAttribute("role", "region");
      pane?.setAttribute("aria-labelledby", `title-${side}`);
    }
    for (const [id, label] of [["transcript", null], ["votes", "votes-label"]]) {
      const part = byId(id);
      if (part && label) {
        part.setAttribute("role", "group");
        part.setAttribute("aria-labelledby", label);
      }
    }
    const talk = byId("talk");
    talk?.setAttribute("tabindex", "0");
    talk?.setAttribute("role", "log");
    talk?.setAttribute("aria-live", "off");
    return true;
  };
  const observer = new MutationObserver(() => {
    name();
    const talk = byId("talk");
    if (talk && talk.dataset.follow !== "no") talk.scrollTop = talk.scrollHeight;
  });
  document.addEventListener("DOMContentLoaded", () => {
    observer.observe(document.body, { childList: true, subtree: true });
  });

  return {
    focus: (selector) => requestAnimationFrame(() => document.querySelector(selector)?.focus()),
    flash: (button) => {
      button.classList.add("done");
      button.addEventListener("blur", () => button.classList.remove("done"), { once: true });
    },
    speak: (language) => {
      document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
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
